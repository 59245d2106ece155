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
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from filelock import FileLock

from lgp.errors import LgpError
from lgp.models.files import encoder_digest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

T = TypeVar("T")
CHAMPION = "champion"
FLUSH_EVERY_S = 2.0


class _Registered(NamedTuple):
    """A kind of model in the registry: its name there, the code that it carries, and what this needs."""

    registry: str
    code: Path
    artifact: str
    needs: tuple[str, ...]


HERE = Path(__file__).parent
NEEDS = ("mlflow", "timm", "torch", "torchvision", "numpy")
ENCODERS = _Registered("lgp-encoder", HERE / "registered_encoder.py", "encoder", NEEDS)
CLASSIFIERS = _Registered(
    "lgp-classifier", HERE / "registered_classifier.py", "classifier", (*NEEDS, "pandas", "pillow")
)

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # a server that is down must not delay a training by minutes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # a stage prints its own few lines
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def _configure() -> None:
    """Set the environment variables that MLflow reads at its import, unless the user has set them."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def store_uri(configured: str | None, root: Path) -> str:
    """Return the tracking address: `MLFLOW_TRACKING_URI`, else `run.tracking_uri`, else SQLite in `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or configured or f"sqlite:///{root.resolve() / 'mlflow.db'}"


class _Mlflow:
    """One open run of an MLflow store."""

    def __init__(self, uri: str, experiment: str, root: Path) -> None:
        _configure()
        import mlflow

        self.mlflow = mlflow
        self.run_id = ""
        (root / ".lgp").mkdir(exist_ok=True)
        # the client creates the tables of a new store at once; two processes that do so at the same time crash
        with FileLock(root / ".lgp" / "mlflow.lock"):
            if uri.startswith("sqlite:///"):
                with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
                    database.execute("PRAGMA journal_mode=WAL")
            mlflow.set_tracking_uri(uri)
            self.client = mlflow.MlflowClient(uri)
            self.experiment_id = self._open_experiment(uri, experiment, root)

    def _open_experiment(self, uri: str, experiment: str, root: Path) -> str:
        found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            return str(found.experiment_id)
        local = (root / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:///") else None
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
        self.client.log_batch(self.run_id, params=[Param(k, v[:6000]) for k, v in params.items()])
        return self.run_id

    def _reopen(self, run_id: str) -> bool:
        """Continue a run. Return False where this store does not have it (the address has changed)."""
        try:
            self.client.update_run(run_id, status="RUNNING")
        except self.mlflow.exceptions.MlflowException:
            return False
        self.run_id = run_id
        return True

    def log(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for step, values in rows for name, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def log_encoder(self, folder: Path, tags: dict[str, str]) -> str:
        """Log an encoder folder as a model and register it; return its version."""
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        config = json.loads((folder / "config.json").read_text())
        channels, height, width = config["pretrained_cfg"]["input_size"]
        signature = ModelSignature(
            inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, height, width, channels))]),
            outputs=Schema([TensorSpec(np.dtype("float32"), (-1, config["num_features"]))]),
        )
        return self._log_model(ENCODERS, folder, tags, f"encoder-{tags['arm']}", signature)

    def log_classifier(self, folder: Path, tags: dict[str, str]) -> str:
        """Log a classifier folder as a model that takes encoded images or arrays; return its version."""
        return self._log_model(CLASSIFIERS, folder, tags, f"classifier-{tags['arm']}-{tags['task']}", None)

    def _log_model(self, kind: "_Registered", folder: Path, tags: dict[str, str], name: str, signature: Any) -> str:
        with self.mlflow.start_run(run_id=self.run_id), warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # MLflow asks for an input example, which would load the model
            info = self.mlflow.pyfunc.log_model(
                name=name,
                python_model=str(kind.code),
                artifacts={kind.artifact: str(folder)},
                pip_requirements=[f"{p}=={version(p)}" for p in kind.needs],
                signature=signature,
                registered_model_name=kind.registry,
            )
        # the block above marks the run as ended, but the run continues
        self.client.update_run(self.run_id, status="RUNNING")
        number = str(info.registered_model_version)
        for key, value in tags.items():
            self.client.set_model_version_tag(kind.registry, number, key, value)
        return number

    def version_of(self, registry: str, tag: str, digest: str) -> str | None:
        """Return the newest registered version whose tag has this digest."""
        found = self.client.search_model_versions(f"name='{registry}' and tag.{tag}='{digest}'")
        return max((str(v.version) for v in found), key=int, default=None)


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
    """

    arm: str
    task: str
    tags: dict[str, str]
    values: dict[str, str]
    uri: str | None
    experiment: str


class Tracker:
    """One run of one stage, in MLflow or, where that fails, in a file of JSON lines.

    The run opens when something is logged for the first time. A stage that fails earlier leaves no run.
    """

    def __init__(self, description: Description, root: Path, resume_file: Path) -> None:
        """Prepare a run. `resume_file` has the id of a run to continue, if any; the id of this run is written to it."""
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        file = f"{description.arm}-{description.task}-{stamp}-{os.getpid()}.jsonl"
        self._description, self._root, self._resume_file = description, root, resume_file
        self._mlflow: _Mlflow | None = None
        self._opened = False
        self._lines = root / ".lgp" / "tracking" / file
        self._epochs: list[tuple[int, dict[str, float]]] = []
        self._upstream: str | None = None
        self._flushed = time.monotonic()
        self._started_ms = int(time.time() * 1000)  # the run opens later, and begins now
        self._to_register: tuple[Path, dict[str, str]] | None = None

    def attempt(self, action: Callable[[_Mlflow], T], record: dict[str, Any]) -> T | None:
        """Do an action in MLflow. If it fails, warn once, and from then on write `record` to the file."""
        if not self._opened:
            self._open()
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

    def _open(self) -> None:
        """Connect to the store, and open or continue the run."""
        self._opened = True
        about = self._description
        uri, name = store_uri(about.uri, self._root), f"{about.arm} / {about.task}"
        try:
            self._mlflow = _Mlflow(uri, about.experiment, self._root)
        except Exception as e:  # noqa: BLE001
            self._give_up(e)
        resume = self._resume_file.read_text().strip() if self._resume_file.exists() else None
        started = self.attempt(
            lambda m: m.start(name, about.tags, about.values, resume, self._started_ms),
            {"run": name, "tags": about.tags, "params": about.values},
        )
        if started:
            self._resume_file.write_text(f"{started}\n")

    def _give_up(self, reason: Exception) -> None:
        """Continue without MLflow."""
        self._mlflow = None
        text = " ".join(str(reason).split())[:200]
        print(
            f"warning: MLflow tracking failed ({type(reason).__name__}: {text}); writing to {self._lines}", flush=True
        )

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
        """Log final metrics, all in one call. The first metric is the headline of the compare page."""
        self.attempt(lambda m: m.log([(0, metrics)]), {"metrics": metrics})

    def log_figure(self, path: Path) -> None:
        """Log a picture (or page) at the artifact root, where the compare page looks."""
        self.attempt(lambda m: m.client.log_artifact(m.run_id, str(path)), {"figure": str(path)})

    def log_confusion(self, predictions: "pd.DataFrame", classes: list[str]) -> None:
        """Draw and log the confusion matrix."""
        self._log_drawing("confusion.png", lambda figures, path: figures.plot_confusion(path, predictions, classes))

    def log_reconstructions(self, images: "Mapping[str, Tensor]") -> None:
        """Draw and log the reconstructions of a masked autoencoder."""
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
            self.attempt(lambda m: m.log_encoder(folder, tags), {"encoder": str(folder), **tags})

    def tag_upstream(self, digest: str) -> None:
        """Note the encoder that the run uses. The run is tagged at its end with that encoder's run, if known."""
        self._upstream = digest

    def _tag_upstream(self) -> None:
        def tag(m: _Mlflow) -> None:
            runs = m.client.search_runs([m.experiment_id], f"tags.encoder_digest = '{self._upstream}'", max_results=1)
            if runs:
                m.client.set_tag(m.run_id, "upstream_run", runs[0].info.run_id)

        self.attempt(tag, {})

    def set_champions(self, encoder: Path, arm: str, digest: str, classifier: Path | None) -> None:
        """Point the alias `champion` at an arm's encoder, and at its classifier if it has one that timm loads."""
        self.set_champion(encoder, arm, digest)
        if classifier is None:
            self.remove_champion_classifier()
        else:
            self.set_champion_classifier(classifier, arm, classifier.name, encoder_digest(classifier))

    def set_champion(self, folder: Path, arm: str, digest: str) -> None:
        """Point the alias `champion` at this encoder's version. An encoder that the store lacks is registered first."""

        def point(m: _Mlflow) -> None:
            known = m.version_of(ENCODERS.registry, "encoder_digest", digest)
            number = known or m.log_encoder(folder, {"arm": arm, "encoder_digest": digest})
            m.client.set_registered_model_alias(ENCODERS.registry, CHAMPION, number)

        self.attempt(point, {"champion": arm, "encoder_digest": digest})

    def set_champion_classifier(self, folder: Path, arm: str, task: str, digest: str) -> None:
        """Point the alias `champion` at this classifier's version. One that the store lacks is registered first."""

        def point(m: _Mlflow) -> None:
            known = m.version_of(CLASSIFIERS.registry, "digest", digest)
            number = known or m.log_classifier(folder, {"arm": arm, "task": task, "digest": digest})
            m.client.set_registered_model_alias(CLASSIFIERS.registry, CHAMPION, number)

        self.attempt(point, {"champion_classifier": f"{arm}/{task}", "digest": digest})

    def remove_champion(self) -> None:
        """Take the alias `champion` away, where an earlier report has set it: nobody is crowned now."""
        self._remove_champion(ENCODERS)
        self.remove_champion_classifier()

    def remove_champion_classifier(self) -> None:
        """Take the alias `champion` away from classifiers: the champion has none that timm loads."""
        self._remove_champion(CLASSIFIERS)

    def _remove_champion(self, kind: _Registered) -> None:
        def remove(m: _Mlflow) -> None:
            found = m.client.search_registered_models(f"name='{kind.registry}'")
            if any(CHAMPION in model.aliases for model in found):
                m.client.delete_registered_model_alias(kind.registry, CHAMPION)

        self.attempt(remove, {f"champion of {kind.registry}": None})

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
        super().__init__(Description("", "", {}, {}, None, ""), Path(), Path())

    def attempt(self, action: Callable[[_Mlflow], T], record: dict[str, Any]) -> T | None:
        """Do nothing."""
        return None

    def _open(self) -> None:
        self._opened = True


@contextmanager
def tracked(description: Description, root: Path, resume_file: Path) -> Iterator[Tracker]:
    """Track the block as a run named `<arm> / <task>`. The run is closed with a status that says how the block ended.

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


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Turn nested values into `{"section.key": "text"}`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: str(value)}
    return flat


def serve(uri: str, port: int, announce: Callable[[], None]) -> NoReturn:
    """Call `announce`, then become MLflow's server on 127.0.0.1.

    Raises:
        LgpError: the port is in use, or the runs are not in the project's own store.
    """
    if not uri.startswith("sqlite:"):
        raise LgpError(f"runs are tracked at {uri}: open that address, `lgp ui` serves this project's own store only")
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
