"""The MLflow store of a project: runs, logged models, datasets, the registry, and the server that shows them.

Nothing here is guarded: `lgp.workflow.tracking` calls it, and goes on where it fails.
"""

import io
import json
import logging
import os
import re
import shutil
import socket
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote

from filelock import FileLock

from lgp.compute.liveness import ProcessName
from lgp.data.sources.cells import printable
from lgp.errors import LgpError, escaped, without_credentials
from lgp.models.files import CONFIG, LAST
from lgp.workflow.moved_store import ARTIFACTS, follow

SQLITE = "sqlite:///"  # how the address of a store in a file begins
CHAMPION = "champion"
PROCESS = "lgp.process"  # the tag of a run that says who writes it
# metrics of a run that its encoder has too. MLflow's list of models has a column for each metric and task: all forty of
# an evaluation would hide the one that ranks
LINKED = ("test/top1", "test/top1_low", "test/top1_high", "val/top1", "test/ece", "test/knn_top1")


class Registered(NamedTuple):
    """A kind of model in the registry: its name there, the code that it carries, and what this needs."""

    registry: str
    code: Path
    artifact: str
    needs: tuple[str, ...]


HERE = Path(__file__).parent
NEEDS = ("mlflow", "timm", "torch", "torchvision", "numpy", "pandas", "pillow")
ENCODERS = Registered("lgp-encoder", HERE / "registered_encoder.py", "encoder", NEEDS)
CLASSIFIERS = Registered("lgp-classifier", HERE / "registered_classifier.py", "classifier", NEEDS)

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # a server that is down must not delay a training by minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # a stage prints its own few lines
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # its own lines at the end of a run have the address of the server as it was given, with the password
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # the versions that a model needs are written by `log_model`, from what is installed here
    "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
    # of the server: neither calls of language models nor jobs have a use here
    "MLFLOW_ENABLE_AI_GATEWAY": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
DATASET_DIGEST_CHARACTERS = 8  # MLflow shows it in headings, and takes at most 36


def _configure() -> None:
    """Set the environment variables that MLflow reads at its import, unless the user has set them."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def has_store(configured: str | None, root: Path) -> bool:
    """Return whether a project may have a store: a server, or a database that exists."""
    try:
        file = file_of(store_uri(configured, root))
    except LgpError:
        return False
    return file is None or file.exists()


def file_of(uri: str) -> Path | None:
    """Return the file of a store in SQLite, None for a server. What follows a `?` in the address are settings."""
    if not uri.startswith(SQLITE):
        return None
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))


def store_uri(configured: str | None, root: Path) -> str:
    """Return the tracking address: `MLFLOW_TRACKING_URI`, else `run.tracking_uri`, else SQLite in `root`.

    Raises:
        LgpError: MLflow cannot write to the path of `root`.
    """
    if given := os.environ.get("MLFLOW_TRACKING_URI") or configured:
        return given
    folder = str(root.resolve())
    # SQLAlchemy reads %20 as a blank, and what follows a ? as settings. MLflow makes the folder of either reading, so
    # something would be made outside of the project
    if "?" in folder or unquote(folder) != folder or {"'", '"'} <= set(folder) or printable(folder) != folder:
        raise LgpError(
            f"MLflow cannot keep its store in {escaped(folder)}: the path has a ?, a code like %20 or quotes of both "
            "kinds, or is not UTF-8; rename the folder, or set run.tracking_uri to a store elsewhere"
        )
    return f"{SQLITE}{folder}/mlflow.db"


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation measures.

    Attributes:
        encoder: its folder; None where the encoder is not there any more.
        digest: of the encoder.
        inputs: digests of what the stage read, by path. Those below `data/` are the dataset.
    """

    encoder: Path | None
    digest: str
    inputs: Mapping[str, str]

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Evaluated":
        """Return what `record` has written."""
        encoder = None if record["encoder"] is None else Path(record["encoder"])
        return cls(encoder, record["digest"], record["inputs"])

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        encoder = None if self.encoder is None else str(self.encoder)
        return {"encoder": encoder, "digest": self.digest, "inputs": dict(self.inputs)}

    @property
    def data(self) -> dict[str, str]:
        """Digests of the images and labels, by path."""
        return {path: digest for path, digest in sorted(self.inputs.items()) if Path(path).parts[0] == "data"}


@dataclass(frozen=True)
class TrackedResult:
    """A finished evaluation in the store.

    Attributes:
        run_id: of its run.
        arm: of the encoder.
        tags: of the run.
        params: of the run.
        metrics: of the run.
        started_ms: when it began.
    """

    run_id: str
    arm: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    started_ms: int


class OpenRun(NamedTuple):
    """A run that is not closed: its name, its id, and when it began, in milliseconds since 1970."""

    name: str
    run_id: str
    started_ms: int


class Links(NamedTuple):
    """The logged model and the dataset that metrics belong to, as MLflow names them."""

    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class Logged(NamedTuple):
    """A logged model: its version in the registry, and its id."""

    version: str
    model_id: str


@contextmanager
def _as_logged(folder: Path, scratch: Path) -> Iterator[Path]:
    """Yield a folder whose files are no links, without the encoder of the last step beside an average.

    MLflow refuses links, as DVC makes with `cache.type symlink`.
    """
    if not (folder / LAST).exists() and not any(path.is_symlink() for path in folder.rglob("*")):
        yield folder
        return
    with TemporaryDirectory(prefix=".partial.", dir=scratch) as place:
        yield Path(shutil.copytree(folder, Path(place) / folder.name, ignore=shutil.ignore_patterns(LAST)))


@contextmanager
def _other_version_said(uri: str) -> Iterator[None]:
    """Say that another version of MLflow wrote a database, and what to do. MLflow itself always tells to upgrade."""
    import mlflow

    try:
        yield
    except mlflow.exceptions.MlflowException as e:
        found = re.search(r"database schema \(found version (\w+)", str(e))
        if found is None:
            raise
        migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
        older = any(found[1] in file.name for file in migrations.glob("*.py"))
        if older:
            how = f"keep a copy of it, and run `python -m mlflow db upgrade {without_credentials(uri)}`"
        else:
            how = "install that version, or name another store by run.tracking_uri"
        raise LgpError(
            f"{'an older' if older else 'a newer'} MLflow than {mlflow.__version__}, which is installed, wrote this "
            f"database: {how}"
        ) from None


def load() -> None:
    """Import what a store in a database needs. It takes two seconds, which forks of this process then save."""
    _configure()
    import_module("mlflow.store.tracking.sqlalchemy_store")


class Store:
    """An MLflow store, and one open run of it."""

    def __init__(self, uri: str, experiment: str, root: Path) -> None:
        _configure()
        import mlflow

        # another part of the process may have imported it before, with more to say
        logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
        # it prints tracebacks of errors while it cleans up after an error, as after a stop; it raises all that matters
        logging.getLogger("sqlalchemy").setLevel(logging.CRITICAL)
        self.mlflow = mlflow
        self.run_id = ""
        self.scratch = root / ".lgp"
        self.scratch.mkdir(exist_ok=True)
        self.lock = FileLock(self.scratch / "mlflow.lock")
        # the client creates the tables of a new store at once; two processes that do so at the same time crash
        with self.lock:
            if file := file_of(uri):
                with closing(sqlite3.connect(file)) as database:
                    database.execute("PRAGMA journal_mode=WAL")
                for address in follow(file, root):
                    place = escaped(unquote(address.removeprefix("file://")))
                    print(f"MLflow's store came from {place}: its addresses are those of this folder now", flush=True)
            mlflow.set_tracking_uri(uri)
            with _other_version_said(uri):
                self.client = mlflow.MlflowClient(uri)
                self.experiment_id = self._open_experiment(uri, experiment, root)

    def _open_experiment(self, uri: str, experiment: str, root: Path) -> str:
        found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise LgpError(
                    f"its experiment {experiment!r} was deleted: restore it with `python -m mlflow experiments restore "
                    f"--experiment-id {found.experiment_id}`, or name another one by run.experiment"
                )
            return str(found.experiment_id)
        local = (root / ARTIFACTS).resolve().as_uri() if file_of(uri) else None
        try:
            return str(self.client.create_experiment(experiment, artifact_location=local))
        except self.mlflow.exceptions.MlflowException as e:
            if e.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # another project has made it since, on the same server
        return str(self.client.get_experiment_by_name(experiment).experiment_id)

    def start(
        self, name: str, tags: dict[str, str], params: dict[str, str], resume: str | None, started_ms: int
    ) -> str:
        """Open a run, or continue the run `resume` where the store has it; return its id.

        Args:
            name: of the run.
            tags: name → text.
            params: `section.key` → text.
            resume: id of a run to continue.
            started_ms: when the stage began, in milliseconds since 1970.
        """
        from mlflow.entities import Param

        self._close_killed()
        tags, self.logged_epochs = {**tags, PROCESS: ProcessName.own().text}, 0
        if resume is not None and self._reopen(resume):
            self.logged_epochs = max(self.steps("train/loss"), default=0)
            return self.run_id
        run = self.client.create_run(self.experiment_id, start_time=started_ms, tags=tags, run_name=name)
        self.run_id = str(run.info.run_id)
        entries = [Param(k, v[:6000]) for k, v in params.items()]
        for first in range(0, len(entries), 100):
            self.client.log_batch(self.run_id, params=entries[first : first + 100])
        return self.run_id

    def _reopen(self, run_id: str) -> bool:
        """Continue a run. Return False where this store does not have it."""
        if self._find(run_id) is None:
            return False
        self.client.update_run(run_id, status="RUNNING")
        self.client.set_tag(run_id, PROCESS, ProcessName.own().text)
        self.run_id = run_id
        return True

    def _find(self, run_id: str) -> Any | None:
        """Return a run, None where this store does not have it: the address has changed, or the run was deleted.

        Any other failure is raised. MLflow has one class for all of them, and a server that is coming back has the run.
        """
        try:
            run = self.client.get_run(run_id)
        except self.mlflow.exceptions.MlflowException as e:
            if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def attach(self, run_id: str | None) -> bool:
        """Write into a run as it is, without reopening it.

        Return whether it must not be reopened: it has finished, or another process may write it.
        """
        run = None if run_id is None else self._find(run_id)
        if run is None:
            return False
        writer, own = run.data.tags.get(PROCESS), ProcessName.own()
        written = run.info.status == "RUNNING" and writer not in (None, own.text) and ProcessName(writer).may_live()
        self.run_id = str(run.info.run_id)
        return run.info.status == "FINISHED" or written

    def _close_killed(self) -> None:
        """Close the runs whose process on this machine is gone. Nothing else would, and they would seem to run."""
        asked = f"attributes.status = 'RUNNING' AND tags.`{PROCESS}` LIKE '{socket.gethostname()} %'"
        running = self.client.search_runs([self.experiment_id], asked)
        gone = [run for run in running if not ProcessName(run.data.tags[PROCESS]).may_live()]
        for run in gone:
            self.client.set_terminated(run.info.run_id, "KILLED")

    def steps(self, metric: str) -> set[int]:
        """Return the steps at which the run has a metric."""
        return {point.step for point in self.client.get_metric_history(self.run_id, metric)}

    def tag_upstream(self, digest: str) -> None:
        """Tag the run with the run that registered an encoder, if the store knows it."""
        runs = self.client.search_runs([self.experiment_id], f"tags.encoder_digest = '{digest}'", max_results=1)
        if runs:
            self.client.set_tag(self.run_id, "upstream_run", runs[0].info.run_id)

    def log(
        self, rows: Sequence[tuple[int, Mapping[str, float]]], links: Links | None = None, at_ms: int | None = None
    ) -> None:
        """Log metrics.

        Args:
            rows: a step, and its metrics by name.
            links: the model and the dataset that the metrics in `LINKED` belong to.
            at_ms: when they were measured; None: now.
        """
        from mlflow.entities import Metric

        measured_ms = at_ms or int(time.time() * 1000)
        of = {} if links is None else dict.fromkeys(LINKED, links._asdict())
        metrics = [
            Metric(name, float(value), measured_ms, step, **of.get(name, {}))
            for step, values in rows
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def link(self, evaluated: Evaluated, arm: str, task: str) -> Links:
        """Make an encoder and a dataset inputs of the run; return what its metrics belong to.

        The dataset is called as the task, and its digest is of images and labels. Metrics of one task on the same data
        therefore have one column among MLflow's models.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        models, datasets, links = [], [], Links()
        if evaluated.encoder is not None:
            model_id = self.encoder_model(evaluated.encoder, {"arm": arm, "encoder_digest": evaluated.digest})
            models, links = [LoggedModelInput(model_id)], Links(model_id)
        if evaluated.data:
            profile = json.dumps(evaluated.data)
            digest = sha256(profile.encode()).hexdigest()[:DATASET_DIGEST_CHARACTERS]
            source = json.dumps({"uri": next(iter(evaluated.data))})
            dataset = Dataset(task, digest, "local", source, profile=profile)
            datasets = [DatasetInput(dataset, [InputTag("mlflow.data.context", "test")])]
            links = links._replace(dataset_name=task, dataset_digest=digest)
        self.client.log_inputs(self.run_id, datasets=datasets, models=models)
        return links

    def encoder_model(self, folder: Path, tags: dict[str, str]) -> str:
        """Return the id of the logged model of an encoder. One that the experiment lacks is logged first.

        A call that failed may have left a model without its files, which does not count, or one without a version in
        the registry, which gets one.
        """
        with self.lock:
            asked = f"tags.encoder_digest = '{tags['encoder_digest']}' AND tags.arm = '{tags['arm']}'"
            found = self.client.search_logged_models([self.experiment_id], asked)
            ready = [str(model.model_id) for model in found if model.status == "READY"]
            loads = "num_features" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            if loads and not ready:
                return self.log_encoder(folder, tags).model_id
            if loads and not any(self._versions(ENCODERS, model_id) for model_id in ready):
                with redirect_stderr(io.StringIO()):
                    self.mlflow.register_model(f"models:/{ready[0]}", ENCODERS.registry, tags=tags)
            if ready:
                return ready[0]
            # raw pixels have no encoder to load, and are a row among the models
            model = self.client.create_logged_model(self.experiment_id, f"encoder-{tags['arm']}", self.run_id, tags)
            self.client.finalize_logged_model(model.model_id, "READY")
            return str(model.model_id)

    def register_encoder(self, folder: Path, tags: dict[str, str]) -> None:
        """Make an encoder an output of the run. The same bytes are not logged twice."""
        from mlflow.entities import LoggedModelOutput

        model_id = self.encoder_model(folder, tags)
        if self.client.get_logged_model(model_id).source_run_id != self.run_id:
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, 0)])

    def log_encoder(self, folder: Path, tags: dict[str, str]) -> Logged:
        """Log an encoder folder as a model that takes arrays or encoded images, and register it."""
        return self._log_model(ENCODERS, folder, tags, f"encoder-{tags['arm']}")

    def log_classifier(self, folder: Path, tags: dict[str, str]) -> Logged:
        """Log a classifier folder as a model that takes encoded images or arrays, and register it."""
        return self._log_model(CLASSIFIERS, folder, tags, f"classifier-{tags['arm']}-{tags['task']}")

    def _log_model(self, kind: Registered, folder: Path, tags: dict[str, str], name: str) -> Logged:
        with (
            _as_logged(folder, self.scratch) as files,
            self.mlflow.start_run(run_id=self.run_id),
            warnings.catch_warnings(),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")  # MLflow asks for an input example, which would load the model
            info = self.mlflow.pyfunc.log_model(
                name=name,
                python_model=str(kind.code),
                artifacts={kind.artifact: str(files)},
                pip_requirements=[f"{p}=={version(p)}" for p in kind.needs],
                registered_model_name=kind.registry,
                tags=tags,
            )
        # the block above marks the run as ended, but the run continues
        self.client.update_run(self.run_id, status="RUNNING")
        number = str(info.registered_model_version)
        for key, value in tags.items():
            self.client.set_model_version_tag(kind.registry, number, key, value)
        return Logged(number, str(info.model_id))

    def _versions(self, kind: Registered, model_id: str) -> list[Any]:
        """Return the versions of a logged model in the registry."""
        return list(self.client.search_model_versions(f"name='{kind.registry}' and source_path='models:/{model_id}'"))

    def version_of(self, registry: str, tag: str, digest: str) -> str | None:
        """Return the newest registered version whose tag has this digest."""
        found = self.client.search_model_versions(f"name='{registry}' and tag.{tag}='{digest}'")
        return max((str(v.version) for v in found), key=int, default=None)

    def champion_of(self, kind: Registered) -> Any | None:
        """Return the version that has the alias `champion`, None without one."""
        found = self.client.search_registered_models(f"name='{kind.registry}'")
        if not any(CHAMPION in model.aliases for model in found):
            return None
        return self.client.get_model_version_by_alias(kind.registry, CHAMPION)

    def crown(self, kind: Registered, number: str, why: str) -> None:
        """Point the alias `champion` at a version, and tag that version alone with the reason.

        The alias moves at once: who loads the champion meanwhile gets the one before or this one.
        """
        self.client.set_registered_model_alias(kind.registry, CHAMPION, number)
        self.client.set_model_version_tag(kind.registry, number, CHAMPION, why)
        for other in self.client.search_model_versions(f"name='{kind.registry}'"):
            if CHAMPION in other.tags and str(other.version) != number:
                self.client.delete_model_version_tag(kind.registry, other.version, CHAMPION)

    def uncrown(self, kind: Registered) -> None:
        """Take the alias `champion` and its reason away, where a version has them."""
        before = self.champion_of(kind)
        if before is not None:
            self.client.delete_registered_model_alias(kind.registry, CHAMPION)
            if CHAMPION in before.tags:
                self.client.delete_model_version_tag(kind.registry, before.version, CHAMPION)

    def unfinished(self) -> list[OpenRun]:
        """Return the runs that are not closed, the newest first: of stages that run, or that were killed."""
        found = self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
        return [OpenRun(run.info.run_name, run.info.run_id, run.info.start_time) for run in found]

    def results(self, asked: str) -> list[TrackedResult]:
        """Return the finished evaluations that a filter asks for, the newest first."""
        found, token = [], None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], f"{asked} AND attributes.status = 'FINISHED'", page_token=token
            )
            found += [_result_of(run) for run in page if "test/top1" in run.data.metrics]
            token = page.token
            if not token:
                return found


def _result_of(run: Any) -> TrackedResult:
    data = run.data
    return TrackedResult(run.info.run_id, data.tags["arm"], data.tags, data.params, data.metrics, run.info.start_time)


def is_own(uri: str) -> bool:
    """Return whether an address is a database, which `serve` can show, rather than a server."""
    return uri.startswith("sqlite:")


def served_at(uri: str, port: int) -> str:
    """Return the address of the interface of a store: the server itself, or that of `lgp ui`."""
    return f"http://127.0.0.1:{port}" if is_own(uri) else uri.rstrip("/")


def serve(uri: str, port: int, announce: Callable[[], None]) -> NoReturn:
    """Call `announce`, then become MLflow's server on 127.0.0.1.

    Raises:
        LgpError: the port is in use.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise LgpError(f"port {port} is in use: choose another, e.g. `lgp ui --port {port + 1}`") from None
    _configure()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    announce()
    # the server replaces this process, so that stopping this process stops the server
    os.execv(sys.executable, command)
