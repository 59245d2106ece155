"""Experiment tracking. All that a stage asks of MLflow goes through here.

MLflow is a view of the files that the stages write. Where it is missing or does not answer, a stage warns once and
writes JSON lines instead. A run that was open sends them when the store answers again, `lgp tracking sync` the others.
No result is lost.
"""

import getpass
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lgp.compute.digests import file_digest
from lgp.compute.interruption import stop_of
from lgp.errors import LgpError, escaped, is_disk_full, one_line, without_credentials
from lgp.models.files import CLASSIFIERS as CLASSIFIER_FOLDERS
from lgp.models.files import CONFIG, WEIGHTS, classifier_digest
from lgp.workflow.kept_runs import AFTER_REPORT, KEPT, KeptRun, go_on
from lgp.workflow.mlflow_store import CLASSIFIERS, ENCODERS, Evaluated, Registered, Store, TrackedResult, store_uri

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

T = TypeVar("T")
FLUSH_EVERY_S = 2.0
REFUSALS = {
    "HTTPS?ConnectionPool": "the server does not answer",
    "error code 401": "the server refuses the user or the password: set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD",
    "error code 403": "the server does not let this user do that: docs/teams.md names the permissions",
}
ASK_AGAIN_S = 60.0  # after a failure; later where an attempt takes long
ASKING_SHARE = 0.02  # of the time, at most, that a training may spend on attempts


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
        self.description = replace(description, tags=description.tags | user_tag())
        self._resume_file = resume_file
        self.uri, self.root = description.uri, root
        self.experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or description.experiment
        self._store: Store | None = None
        self._connected = self._opened = False
        self._started_ms = int(time.time() * 1000)  # the run opens later, and begins now
        self._kept = KeptRun(root / KEPT / file, {**asdict(self.description), "started_ms": self._started_ms})
        self._run_id: str | None = None  # of the run that is open, or that is to be continued
        self._begun = False  # whether the store has opened the run for this process
        self._lost = False
        self._epochs: list[tuple[int, dict[str, float]]] = []
        self._upstream: str | None = None
        self._flushed = time.monotonic()
        self._to_register: tuple[Path, dict[str, str]] | None = None
        self._evaluated: Evaluated | None = None
        self._asked_again = math.inf  # when the store may be asked again, where it failed

    @property
    def answers(self) -> bool:
        """Whether the store has answered so far. False before anything was logged."""
        return self._store is not None

    def attempt(self, action: Callable[[Store], T], record: dict[str, Any]) -> T | None:
        """Do an action in the run. If it fails, warn once, and from then on write `record` to the file."""
        if not self._opened:
            self._open()
        return self._guarded(action, record)

    def ask(self, action: Callable[[Store], T]) -> T | None:
        """Do an action in the store that belongs to no run. If it fails, warn once; the result is None."""
        self._connect()
        return self._guarded(action, {})

    def _guarded(self, action: Callable[[Store], T], record: dict[str, Any]) -> T | None:
        if self._store is not None:
            try:
                return action(self._store)
            except Exception as e:  # noqa: BLE001 - whatever goes wrong with tracking must not end a training
                self._give_up(e)
        if record and not self._lost:
            try:
                self._kept.write(record, self._run_id)
            except OSError as e:
                self._lost = True
                print(f"warning: {self._kept.file} cannot be written either ({e}): this run is not tracked", flush=True)
        return None

    def _connect(self) -> None:
        """Connect to the store."""
        if self._connected:
            return
        self._connected = True
        try:
            self._store = Store(store_uri(self.uri, self.root), self.experiment, self.root)
        except Exception as e:  # noqa: BLE001
            self._give_up(e)

    def _open(self) -> None:
        """Open or continue the run."""
        self._opened = True
        self._connect()
        about = self.description
        self._run_id = self._run_to_continue()
        started = self.attempt(
            lambda m: m.start(about.name, about.tags, about.values, self._run_id, self._started_ms),
            {"opened": about.name},
        )
        if started:
            self._note(started)

    def _note(self, run_id: str) -> None:
        self._run_id, self._begun = run_id, True
        with suppress(OSError):  # without the note a resumed training gets a run of its own
            self._resume_file.write_text(f"{run_id}\n", encoding="utf-8")

    def _run_to_continue(self) -> str | None:
        try:
            return self._resume_file.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):  # there is none, or it is damaged
            return None

    def _give_up(self, reason: Exception) -> None:
        """Continue without MLflow."""
        self._store = None
        then = ""
        if self._opened:
            self._asked_again = time.monotonic() + ASK_AGAIN_S
            then = f"; `lgp tracking sync` sends it from {escaped(str(self._kept.file))} later"
        if self._is_cut_off():
            then += ", or this run itself if the store answers again"
        print(f"warning: MLflow tracking failed ({_said(reason)}){self._at()}{then}", flush=True)

    def _is_cut_off(self) -> bool:
        """Return whether the store opened the run, and failed since."""
        return self._begun and self._store is None

    def _ask_again(self) -> None:
        """Send what was kept, and go on in the store, if it answers again. Nothing is said where it does not."""
        began = time.monotonic()
        try:
            store = Store(store_uri(self.uri, self.root), self.experiment, self.root)
            self._note(go_on(self._kept.file, store))
        except Exception:  # noqa: BLE001 - the file stays, and has it all
            now = time.monotonic()
            self._asked_again = now + max(ASK_AGAIN_S, (now - began) / ASKING_SHARE)
            return
        self._store, self._asked_again = store, math.inf
        missing = ", but for what could not be written" if self._lost else ""
        print(f"MLflow answers again: it has what was logged meanwhile{missing}", flush=True)
        if self.description.task == "report":
            print(AFTER_REPORT, flush=True)

    def _at(self) -> str:
        try:
            return f" at {escaped(without_credentials(store_uri(self.uri, self.root)))}"
        except LgpError:  # the folder cannot have a store
            return ""

    def log_epoch(self, values: dict[str, float]) -> None:
        """Take the values of one epoch (key `epoch`, from 1). They are sent every few seconds: calls are slow."""
        epoch = int(values["epoch"])
        if not self._opened:
            self._open()
        if self._store is not None and epoch <= self._store.logged_epochs:
            return
        self._epochs.append((epoch, {k: v for k, v in values.items() if k != "epoch"}))
        if time.monotonic() - self._flushed >= FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Send the epochs taken so far, and what was kept before, if it is time to ask the store again."""
        rows, self._epochs = self._epochs, []
        if rows:
            self.attempt(lambda m: m.log(rows), {"epochs": rows})
        if time.monotonic() >= self._asked_again:
            self._ask_again()
        self._flushed = time.monotonic()

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Log final metrics, all in one call. The first metric is the headline of the compare page.

        Those in `LINKED` of an evaluation belong to the logged model of its encoder, and to its dataset.
        """
        about, evaluated = self.description, self._evaluated

        def log(m: Store) -> None:
            links = None if evaluated is None else m.link(evaluated, about.arm, about.task)
            m.log([(0, metrics)], links)

        self.attempt(log, {"metrics": metrics, "evaluated": None if evaluated is None else evaluated.record()})

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
        """Draw a picture and log it. A failure is printed, and does not end the stage."""
        path = self._kept.pictures / name
        try:
            from lgp.report import figures

            path.parent.mkdir(parents=True, exist_ok=True)
            draw(figures, path)
        except Exception as e:  # noqa: BLE001 - the work that it shows is done
            print(f"warning: {name} was not drawn ({_said(e)})", flush=True)
        else:
            self.log_figure(path)
        if self._store is not None:
            shutil.rmtree(path.parent, ignore_errors=True)

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

        def point(m: Store) -> None:
            known = m.version_of(ENCODERS.registry, "encoder_digest", digest)
            number = known or m.log_encoder(folder, {"arm": arm, "encoder_digest": digest}).version
            m.crown(ENCODERS, number, why)

        self.attempt(point, {"champion": arm, "encoder_digest": digest, "why": why})

    def set_champion_classifier(self, folder: Path, arm: str, digest: str, why: str) -> None:
        """Point the alias `champion` at this classifier's version. One that the store lacks is registered first."""
        task = folder.name

        def point(m: Store) -> None:
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

    def _remove_champion(self, kind: Registered) -> None:
        self.attempt(lambda m: m.uncrown(kind), {f"champion of {kind.registry}": None})

    def champion_classifier(self, models: Path) -> Path | None:
        """Return the folder of the classifier with the alias `champion`, None without one.

        It is the project's own, or the registry's copy where the project has another by now.

        Args:
            models: folder of the arms.
        """

        def find(m: Store) -> Path | None:
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

        def read(m: Store) -> pd.DataFrame | None:
            kept = [file.path for file in m.client.list_artifacts(result.run_id) if file.path.endswith(".parquet")]
            return pd.read_parquet(m.client.download_artifacts(result.run_id, kept[0])) if kept else None

        return self.ask(read)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED. A run that failed before anything was logged is not opened."""
        if not self._opened and not self._epochs and status != "FINISHED":
            return
        self.flush()
        upstream = self._upstream
        if upstream:
            self.attempt(lambda m: m.tag_upstream(upstream), {"upstream": upstream})
        # who stops a stage does not wait for a server, nor does one of seconds for a server that was never there
        if status != "KILLED" and (time.monotonic() >= self._asked_again or self._is_cut_off()):
            self._ask_again()
        self.attempt(lambda m: m.client.set_terminated(m.run_id, status), {"status": status})


def _said(reason: Exception) -> str:
    """Return what an error says in one short line, with the remedy for a full disk."""
    text = without_credentials(one_line(reason))[:300]
    for pattern, meaning in REFUSALS.items():  # the rest is the inside of a library
        if re.search(pattern, text):
            return meaning
    if (isinstance(reason, OSError) and is_disk_full(reason)) or re.search("disk is full|No space left", text):
        text += f": free some space there and in {os.environ.get('TMPDIR', '/tmp')}, or set TMPDIR to another folder"
    return text if isinstance(reason, LgpError) else f"{type(reason).__name__}: {text}"


def user_tag() -> dict[str, str]:
    """Return who runs this as MLflow's own tag: LOGNAME, USER, or the account. The name at a server may be a token."""
    try:
        return {"mlflow.user": getpass.getuser()}
    except (OSError, KeyError):  # a container whose user has no name
        return {}


class Untracked(Tracker):
    """Logs nothing. Only the first process of a training is tracked."""

    def __init__(self) -> None:
        """Make a tracker without a run."""
        super().__init__(Description("", "", {}, {}, None, "", ""), Path(), Path())

    def attempt(self, action: Callable[[Store], T], record: dict[str, Any]) -> T | None:
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
        tracker.end("KILLED" if stop_of(e) else "FAILED")
        raise
    tracker.end("FINISHED")


def visitor(uri: str | None, experiment: str, root: Path) -> Tracker:
    """Return a tracker that opens no run: it asks the store only."""
    return Tracker(Description("", "", {}, {}, uri, experiment, ""), root, root / ".lgp" / "no.run")
