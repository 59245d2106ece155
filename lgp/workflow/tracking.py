"""Experiment tracking. No other module imports mlflow, except the file that a registered model carries.

MLflow is a view of the files that the stages write. Where it is missing or does not answer, a stage warns once and
writes JSON lines instead. No result is lost.
"""

import io
import json
import os
import shutil
import socket
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from filelock import FileLock

from lgp.compute.digests import file_digest
from lgp.errors import LgpError
from lgp.models.files import CLASSIFIERS as CLASSIFIER_FOLDERS
from lgp.models.files import CONFIG, WEIGHTS, classifier_digest
from lgp.workflow.moved_store import ARTIFACTS, follow

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

T = TypeVar("T")
CHAMPION = "champion"
FLUSH_EVERY_S = 2.0
# metrics of a run that its encoder has too. MLflow's list of models has a column for each metric and task: all forty of
# an evaluation would hide the one that ranks
LINKED = ("test/top1", "test/top1_low", "test/top1_high", "val/top1", "test/ece", "test/knn_top1")


class _Registered(NamedTuple):
    """A kind of model in the registry: its name there, the code that it carries, and what this needs."""

    registry: str
    code: Path
    artifact: str
    needs: tuple[str, ...]


HERE = Path(__file__).parent
NEEDS = ("mlflow", "timm", "torch", "torchvision", "numpy", "pandas", "pillow")
ENCODERS = _Registered("lgp-encoder", HERE / "registered_encoder.py", "encoder", NEEDS)
CLASSIFIERS = _Registered("lgp-classifier", HERE / "registered_classifier.py", "classifier", NEEDS)

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # a server that is down must not delay a training by minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # a stage prints its own few lines
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
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


def has_store(uri: str) -> bool:
    """Return whether a store may be at an address: a server, or a database that exists."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def store_uri(configured: str | None, root: Path) -> str:
    """Return the tracking address: `MLFLOW_TRACKING_URI`, else `run.tracking_uri`, else SQLite in `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or configured or f"sqlite:///{root.resolve() / 'mlflow.db'}"


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


class _Links(NamedTuple):
    """The logged model and the dataset that metrics belong to, as MLflow names them."""

    model_id: str | None = None
    dataset_name: str | None = None
    dataset_digest: str | None = None


class _Logged(NamedTuple):
    """A logged model: its version in the registry, and its id."""

    version: str
    model_id: str


class _Mlflow:
    """An MLflow store, and one open run of it."""

    def __init__(self, uri: str, experiment: str, root: Path) -> None:
        _configure()
        import mlflow

        self.mlflow = mlflow
        self.run_id = ""
        (root / ".lgp").mkdir(exist_ok=True)
        self.lock = FileLock(root / ".lgp" / "mlflow.lock")
        # the client creates the tables of a new store at once; two processes that do so at the same time crash
        with self.lock:
            if uri.startswith("sqlite:///"):
                file = Path(uri.removeprefix("sqlite:///"))
                with closing(sqlite3.connect(file)) as database:
                    database.execute("PRAGMA journal_mode=WAL")
                for address in follow(file, root):
                    print(f"MLflow's store came from {address}: its addresses are those of this folder now", flush=True)
            mlflow.set_tracking_uri(uri)
            self.client = mlflow.MlflowClient(uri)
            self.experiment_id = self._open_experiment(uri, experiment, root)

    def _open_experiment(self, uri: str, experiment: str, root: Path) -> str:
        found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            return str(found.experiment_id)
        local = (root / ARTIFACTS).resolve().as_uri() if uri.startswith("sqlite:///") else None
        return str(self.client.create_experiment(experiment, artifact_location=local))

    def start(
        self, name: str, tags: dict[str, str], params: dict[str, str], resume: str | None, started_ms: int
    ) -> str:
        from mlflow.entities import Param

        self.logged_epochs = 0
        if resume is not None and self._reopen(resume):
            history = self.client.get_metric_history(resume, "train/loss")
            self.logged_epochs = max((m.step for m in history), default=0)
            return self.run_id
        run = self.client.create_run(self.experiment_id, start_time=started_ms, tags=tags, run_name=name)
        self.run_id = str(run.info.run_id)
        entries = [Param(k, v[:6000]) for k, v in params.items()]
        for first in range(0, len(entries), 100):
            self.client.log_batch(self.run_id, params=entries[first : first + 100])
        return self.run_id

    def _reopen(self, run_id: str) -> bool:
        """Continue a run. Return False where this store does not have it (the address has changed)."""
        try:
            self.client.update_run(run_id, status="RUNNING")
        except self.mlflow.exceptions.MlflowException:
            return False
        self.run_id = run_id
        return True

    def log(self, rows: list[tuple[int, dict[str, float]]], links: _Links | None = None) -> None:
        from mlflow.entities import Metric

        now, of = int(time.time() * 1000), {} if links is None else dict.fromkeys(LINKED, links._asdict())
        metrics = [
            Metric(name, float(value), now, step, **of.get(name, {}))
            for step, values in rows
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def link(self, evaluated: Evaluated, arm: str, task: str) -> _Links:
        """Make an encoder and a dataset inputs of the run; return what its metrics belong to.

        The dataset is called as the task, and its digest is of images and labels. Metrics of one task on the same data
        therefore have one column among MLflow's models.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        models, datasets, links = [], [], _Links()
        if evaluated.encoder is not None:
            model_id = self.encoder_model(evaluated.encoder, {"arm": arm, "encoder_digest": evaluated.digest})
            models, links = [LoggedModelInput(model_id)], _Links(model_id)
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
        """Return the id of the logged model of an encoder. One that the experiment lacks is logged first."""
        with self.lock:
            asked = f"tags.encoder_digest = '{tags['encoder_digest']}' AND tags.arm = '{tags['arm']}'"
            found = self.client.search_logged_models([self.experiment_id], asked, max_results=1)
            if found:
                return str(found[0].model_id)
            if "num_features" in json.loads((folder / CONFIG).read_text()):
                return self.log_encoder(folder, tags).model_id
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

    def log_encoder(self, folder: Path, tags: dict[str, str]) -> _Logged:
        """Log an encoder folder as a model that takes arrays or encoded images, and register it."""
        return self._log_model(ENCODERS, folder, tags, f"encoder-{tags['arm']}")

    def log_classifier(self, folder: Path, tags: dict[str, str]) -> _Logged:
        """Log a classifier folder as a model that takes encoded images or arrays, and register it."""
        return self._log_model(CLASSIFIERS, folder, tags, f"classifier-{tags['arm']}-{tags['task']}")

    def _log_model(self, kind: "_Registered", folder: Path, tags: dict[str, str], name: str) -> _Logged:
        with self.mlflow.start_run(run_id=self.run_id), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # MLflow asks for an input example, which would load the model
            info = self.mlflow.pyfunc.log_model(
                name=name,
                python_model=str(kind.code),
                artifacts={kind.artifact: str(folder)},
                pip_requirements=[f"{p}=={version(p)}" for p in kind.needs],
                registered_model_name=kind.registry,
                tags=tags,
            )
        # the block above marks the run as ended, but the run continues
        self.client.update_run(self.run_id, status="RUNNING")
        number = str(info.registered_model_version)
        for key, value in tags.items():
            self.client.set_model_version_tag(kind.registry, number, key, value)
        return _Logged(number, str(info.model_id))

    def version_of(self, registry: str, tag: str, digest: str) -> str | None:
        """Return the newest registered version whose tag has this digest."""
        found = self.client.search_model_versions(f"name='{registry}' and tag.{tag}='{digest}'")
        return max((str(v.version) for v in found), key=int, default=None)

    def champion_of(self, kind: "_Registered") -> Any | None:
        """Return the version that has the alias `champion`, None without one."""
        found = self.client.search_registered_models(f"name='{kind.registry}'")
        if not any(CHAMPION in model.aliases for model in found):
            return None
        return self.client.get_model_version_by_alias(kind.registry, CHAMPION)

    def crown(self, kind: "_Registered", number: str, why: str) -> None:
        """Point the alias `champion` at a version, and tag that version alone with the reason."""
        self.uncrown(kind)
        self.client.set_registered_model_alias(kind.registry, CHAMPION, number)
        self.client.set_model_version_tag(kind.registry, number, CHAMPION, why)

    def uncrown(self, kind: "_Registered") -> None:
        """Take the alias `champion` and its reason away, where a version has them."""
        before = self.champion_of(kind)
        if before is not None:
            self.client.delete_registered_model_alias(kind.registry, CHAMPION)
            if CHAMPION in before.tags:
                self.client.delete_model_version_tag(kind.registry, before.version, CHAMPION)

    def results(self, asked: str) -> list[TrackedResult]:
        """Return the finished evaluations that a filter asks for, the newest first."""
        found, token = [], None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], f"{asked} AND attributes.status = 'FINISHED'", page_token=token
            )
            found += [
                TrackedResult(r.info.run_id, r.data.tags["arm"], r.data.tags, r.data.params, r.data.metrics, start)
                for r in page
                if "test/top1" in r.data.metrics
                for start in [r.info.start_time]
            ]
            token = page.token
            if not token:
                return found


@dataclass(frozen=True)
class Description:
    """The description of a run: its arm, task, tags and parameters, and where it is tracked.

    Attributes:
        arm: the arm whose encoder it trains or evaluates.
        task: pretrain, linear, fewshot-1pct, …
        tags: name → text.
        values: parameters, `section.key` → text.
        uri: of the store; None for the project's own store.
        experiment: of MLflow.
        name: of the run.
    """

    arm: str
    task: str
    tags: dict[str, str]
    values: dict[str, str]
    uri: str | None
    experiment: str
    name: str


class Tracker:
    """One run of one stage, in MLflow or, where that fails, in a file of JSON lines.

    The run opens when something is logged for the first time. A stage that fails earlier leaves no run.
    """

    def __init__(self, description: Description, root: Path, resume_file: Path) -> None:
        """Prepare a run. `resume_file` has the id of a run to continue, if any; the id of this run is written to it."""
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        file = f"{description.arm}-{description.task}-{stamp}-{os.getpid()}.jsonl"
        self.description, self._resume_file = description, resume_file
        self.uri, self.root = description.uri, root
        self.experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or description.experiment
        self._mlflow: _Mlflow | None = None
        self._connected = self._opened = False
        self._lines = root / ".lgp" / "tracking" / file
        self._epochs: list[tuple[int, dict[str, float]]] = []
        self._upstream: str | None = None
        self._flushed = time.monotonic()
        self._started_ms = int(time.time() * 1000)  # the run opens later, and begins now
        self._to_register: tuple[Path, dict[str, str]] | None = None
        self._evaluated: Evaluated | None = None

    @property
    def answers(self) -> bool:
        """Whether the store has answered so far. False before anything was logged."""
        return self._mlflow is not None

    def attempt(self, action: Callable[[_Mlflow], T], record: dict[str, Any]) -> T | None:
        """Do an action in the run. If it fails, warn once, and from then on write `record` to the file."""
        if not self._opened:
            self._open()
        return self._guarded(action, record)

    def ask(self, action: Callable[[_Mlflow], T]) -> T | None:
        """Do an action in the store that belongs to no run. If it fails, warn once; the result is None."""
        self._connect()
        return self._guarded(action, {})

    def _guarded(self, action: Callable[[_Mlflow], T], record: dict[str, Any]) -> T | None:
        if self._mlflow is not None:
            try:
                return action(self._mlflow)
            except Exception as e:  # noqa: BLE001 - whatever goes wrong with tracking must not end a training
                self._give_up(e)
        if record:
            self._lines.parent.mkdir(parents=True, exist_ok=True)
            with self._lines.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return None

    def _connect(self) -> None:
        """Connect to the store."""
        if self._connected:
            return
        self._connected = True
        try:
            self._mlflow = _Mlflow(store_uri(self.uri, self.root), self.experiment, self.root)
        except Exception as e:  # noqa: BLE001
            self._give_up(e)

    def _open(self) -> None:
        """Open or continue the run."""
        self._opened = True
        self._connect()
        about = self.description
        resume = self._resume_file.read_text().strip() if self._resume_file.exists() else None
        started = self.attempt(
            lambda m: m.start(about.name, about.tags, about.values, resume, self._started_ms),
            {"run": about.name, "tags": about.tags, "params": about.values},
        )
        if started:
            self._resume_file.write_text(f"{started}\n")

    def _give_up(self, reason: Exception) -> None:
        """Continue without MLflow."""
        self._mlflow = None
        text = " ".join(str(reason).split())[:200]
        then = f"; writing to {self._lines}" if self._opened else ""
        print(f"warning: MLflow tracking failed ({type(reason).__name__}: {text}){then}", flush=True)

    def log_epoch(self, values: dict[str, float]) -> None:
        """Take the values of one epoch (key `epoch`, from 1). They are sent every few seconds: calls are slow."""
        epoch = int(values["epoch"])
        if not self._opened:
            self._open()
        if self._mlflow is not None and epoch <= self._mlflow.logged_epochs:
            return
        self._epochs.append((epoch, {k: v for k, v in values.items() if k != "epoch"}))
        if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Send the epochs taken so far."""
        rows, self._epochs = self._epochs, []
        if rows:
            self.attempt(lambda m: m.log(rows), {"epochs": rows})
        self._flushed = time.monotonic()

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Log final metrics, all in one call. The first metric is the headline of the compare page.

        Those in `LINKED` of an evaluation belong to the logged model of its encoder, and to its dataset.
        """
        about, evaluated = self.description, self._evaluated

        def log(m: _Mlflow) -> None:
            links = None if evaluated is None else m.link(evaluated, about.arm, about.task)
            m.log([(0, metrics)], links)

        self.attempt(log, {"metrics": metrics})

    def will_link(self, evaluated: Evaluated) -> None:
        """Note what the run evaluates."""
        self._evaluated = evaluated

    def log_result(self, written: Sequence[Path]) -> None:
        """Identify the result of an evaluation by the digest of its metric file, and log its predictions."""
        if self._evaluated is None:
            return
        for path in written:
            if path.suffix == ".json":
                self.tag("result_digest", file_digest(path))
            elif path.suffix == ".parquet":
                self.log_figure(path)

    def log_figure(self, path: Path) -> None:
        """Log a picture (or another file) at the artifact root, where the compare page looks."""
        self.attempt(lambda m: m.client.log_artifact(m.run_id, str(path)), {"figure": str(path)})

    def log_confusion(self, predictions: "pd.DataFrame", classes: list[str]) -> None:
        """Draw and log the confusion matrix."""
        self._log_drawing("confusion.png", lambda figures, path: figures.plot_confusion(path, predictions, classes))

    def log_reconstructions(self, images: "Mapping[str, Tensor]") -> None:
        """Draw and log the reconstructions of a masked autoencoder. Without a validation image there are none."""
        if not len(images["original"]):
            return
        self._log_drawing("reconstructions.png", lambda figures, path: figures.plot_reconstructions(path, images))

    def log_conflict(self, conflict: "pd.DataFrame") -> None:
        """Draw and log the distribution of gradient cosines per block, and log their medians."""
        medians = conflict.groupby("block", sort=False)["cosine"].median()
        self.log_metrics({f"cosine/{part}": float(value) for part, value in medians.items()})
        self._log_drawing("conflict.png", lambda figures, path: figures.plot_conflict(path, conflict))

    def _log_drawing(self, name: str, draw: Callable[[Any, Path], None]) -> None:
        from lgp.report import figures

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            draw(figures, path)
            self.log_figure(path)
            if self._mlflow is None:
                kept = self._lines.with_suffix("")
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, kept)

    def tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self.attempt(lambda m: m.client.set_tag(m.run_id, name, value), {"tag": {name: value}})

    def will_register(self, folder: Path, arm: str, digest: str) -> None:
        """Note the encoder that `register` will log after the stage has published it."""
        self._to_register = (folder, {"arm": arm, "encoder_digest": digest})

    def register(self) -> None:
        """Log the noted encoder, if any, as a version of the registry."""
        if self._to_register is not None:
            folder, tags = self._to_register
            self.tag("encoder_digest", tags["encoder_digest"])
            self.attempt(lambda m: m.register_encoder(folder, tags), {"encoder": str(folder), **tags})

    def tag_upstream(self, digest: str) -> None:
        """Note the encoder that the run uses. The run is tagged at its end with that encoder's run, if known."""
        self._upstream = digest

    def _tag_upstream(self) -> None:
        def tag(m: _Mlflow) -> None:
            runs = m.client.search_runs([m.experiment_id], f"tags.encoder_digest = '{self._upstream}'", max_results=1)
            if runs:
                m.client.set_tag(m.run_id, "upstream_run", runs[0].info.run_id)

        self.attempt(tag, {})

    def set_champions(self, encoder: Path, arm: str, digest: str, classifier: Path | None, why: str) -> None:
        """Point the alias `champion` at an arm's encoder, and at its classifier if it has one that timm loads.

        The tag `champion` of both says `why`.
        """
        self.set_champion(encoder, arm, digest, why)
        if classifier is None:
            self.remove_champion_classifier()
        else:
            self.set_champion_classifier(classifier, arm, classifier_digest(classifier), why)

    def set_champion(self, folder: Path, arm: str, digest: str, why: str) -> None:
        """Point the alias `champion` at this encoder's version. An encoder that the store lacks is registered first."""

        def point(m: _Mlflow) -> None:
            known = m.version_of(ENCODERS.registry, "encoder_digest", digest)
            number = known or m.log_encoder(folder, {"arm": arm, "encoder_digest": digest}).version
            m.crown(ENCODERS, number, why)

        self.attempt(point, {"champion": arm, "encoder_digest": digest, "why": why})

    def set_champion_classifier(self, folder: Path, arm: str, digest: str, why: str) -> None:
        """Point the alias `champion` at this classifier's version. One that the store lacks is registered first."""
        task = folder.name

        def point(m: _Mlflow) -> None:
            known = m.version_of(CLASSIFIERS.registry, "digest", digest)
            number = known or m.log_classifier(folder, {"arm": arm, "task": task, "digest": digest}).version
            m.crown(CLASSIFIERS, number, why)

        self.attempt(point, {"champion_classifier": f"{arm}/{task}", "digest": digest})

    def remove_champion(self) -> None:
        """Take the alias `champion` away, where an earlier report has set it: nobody is crowned now."""
        self._remove_champion(ENCODERS)
        self.remove_champion_classifier()

    def remove_champion_classifier(self) -> None:
        """Take the alias `champion` away from classifiers: the champion has none that timm loads."""
        self._remove_champion(CLASSIFIERS)

    def _remove_champion(self, kind: _Registered) -> None:
        self.attempt(lambda m: m.uncrown(kind), {f"champion of {kind.registry}": None})

    def champion_classifier(self, models: Path) -> Path | None:
        """Return the folder of the classifier with the alias `champion`, None without one.

        It is the project's own, or the registry's copy where the project has another by now.

        Args:
            models: folder of the arms.
        """

        def find(m: _Mlflow) -> Path | None:
            version = m.champion_of(CLASSIFIERS)
            if version is None:
                return None
            own = models / version.tags["arm"] / CLASSIFIER_FOLDERS / version.tags["task"]
            if (own / WEIGHTS).exists() and classifier_digest(own) == version.tags["digest"]:
                return own
            address = f"models:/{CLASSIFIERS.registry}/{version.version}"
            copy = Path(m.mlflow.artifacts.download_artifacts(address))
            return next(file.parent for file in copy.rglob(CONFIG))

        return self.ask(find)

    def predictions_of(self, result: TrackedResult) -> "pd.DataFrame | None":
        """Read the predictions of a tracked evaluation, None where the store does not have them."""
        import pandas as pd

        def read(m: _Mlflow) -> pd.DataFrame | None:
            kept = [file.path for file in m.client.list_artifacts(result.run_id) if file.path.endswith(".parquet")]
            return pd.read_parquet(m.client.download_artifacts(result.run_id, kept[0])) if kept else None

        return self.ask(read)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED. A run that failed before anything was logged is not opened."""
        if not self._opened and not self._epochs and status != "FINISHED":
            return
        self.flush()
        if self._upstream:
            self._tag_upstream()
        self.attempt(lambda m: m.client.set_terminated(m.run_id, status), {"status": status})


class Untracked(Tracker):
    """Logs nothing. Only the first process of a training is tracked."""

    def __init__(self) -> None:
        """Make a tracker without a run."""
        super().__init__(Description("", "", {}, {}, None, "", ""), Path(), Path())

    def attempt(self, action: Callable[[_Mlflow], T], record: dict[str, Any]) -> T | None:
        """Do nothing."""
        return None

    def _open(self) -> None:
        self._opened = True


@contextmanager
def tracked(description: Description, root: Path, resume_file: Path) -> Iterator[Tracker]:
    """Track the block as a run. The run is closed with a status that says how the block ended.

    Args:
        description: of the run.
        root: folder of the default store.
        resume_file: has the id of a run to continue, if any. The id of this run is written to it.
    """
    tracker = Tracker(description, root, resume_file)
    try:
        yield tracker
    except BaseException as e:
        tracker.end("KILLED" if isinstance(e, KeyboardInterrupt) else "FAILED")
        raise
    tracker.end("FINISHED")


def visitor(uri: str | None, experiment: str, root: Path) -> Tracker:
    """Return a tracker that opens no run: it asks the store only."""
    return Tracker(Description("", "", {}, {}, uri, experiment, ""), root, root / ".lgp" / "no.run")


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
