"""Runs that MLflow did not take: each is a file of JSON lines under `.lgp/tracking/`, which is sent later.

The first line describes the run. Each other line is one call to the tracker. A file of a run `NAME.jsonl` has its
pictures beside it, in the folder `NAME`.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lgp.compute.liveness import ProcessName
from lgp.errors import LgpError
from lgp.models.files import WEIGHTS, encoder_digest
from lgp.workflow.mlflow_store import Evaluated, Store

KEPT = Path(".lgp") / "tracking"
AFTER_REPORT = "`lgp report` points the alias `champion` at the best arm"


class KeptRun:
    """The file of one run. It is begun with the first line."""

    def __init__(self, file: Path, head: Mapping[str, Any]) -> None:
        """Take the path of the file, and the description of the run, which becomes the first line.

        The address of the store is left out: it may hold a password, and the store is chosen anew when the run is sent.
        """
        self.file, self.pictures = file, file.with_suffix("")
        self._head = {name: value for name, value in head.items() if name != "uri"}

    def write(self, record: Mapping[str, Any], run_id: str | None) -> None:
        """Append a line. A figure is copied beside the file: its own place may get another by then.

        Args:
            record: one call, by its name.
            run_id: of the run in the store, where it was opened before, by this process or one that it continues.

        Raises:
            OSError: the file system raised it.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if "figure" in record:
            record = {"figure": self._copy(Path(record["figure"])).name}
        lines = [] if self.file.exists() else [{**self._head, "run_id": run_id, "process": ProcessName.own().text}]
        lines.append({**record, "at_ms": int(time.time() * 1000)})
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def _copy(self, picture: Path) -> Path:
        self.pictures.mkdir(parents=True, exist_ok=True)
        kept = self.pictures / picture.name
        return kept if kept == picture else Path(shutil.copy(picture, kept))


def kept_files(root: Path, all_machines: bool = False) -> tuple[list[Path], list[str]]:
    """Return the files of runs that can be sent, the oldest first, and a line for each other one.

    Args:
        root: of the project.
        all_machines: take runs whose process on another machine may live, too.
    """
    ready, left = [], []
    for file in sorted((root / KEPT).glob("*.jsonl"), key=lambda file: file.stat().st_mtime):
        try:
            head, *records = _lines(file)
        except LgpError as e:
            left.append(str(e))
            continue
        process = ProcessName(head["process"])
        ended = "status" in records[-1]
        if ended or not process.may_live() or (all_machines and not process.is_here()):
            ready.append(file)
        else:
            left.append(f"{file} is left: its process ({process.text}) may still write it")
    return ready, left


def send(file: Path, store: Store) -> str:
    """Send a run to the store, remove its file, and return its task.

    A run that the store has is continued. If it has finished since, or another process writes it, only what is missing
    is added and its end stays. A run without an end was killed, and is closed as KILLED. The file notes a new run
    before anything is sent, so that a call that is cut off goes on with it.

    Args:
        file: of the run.
        store: where it goes.

    Raises:
        LgpError: the file is damaged.
        Exception: whatever MLflow raises. The file stays.
    """
    head, *records = _lines(file)
    attached = store.attach(head["run_id"])
    if not attached:
        _begin(file, head, records, store)
    _send_all(file, head, records, store)
    if not attached:
        last = records[-1]
        store.client.set_terminated(store.run_id, last.get("status", "KILLED"), end_time=last["at_ms"])
    _remove(file)
    return str(head["task"])


def go_on(file: Path, store: Store) -> str:
    """Send what this process has kept of its open run, remove the file, and return the id of the run. It stays open.

    The run is begun anew where the store does not have it any more.

    Raises:
        LgpError: the file is damaged.
        Exception: whatever MLflow raises. The file stays.
    """
    head, *records = _lines(file)
    run_id = _begin(file, head, records, store)
    _send_all(file, head, records, store)
    _remove(file)
    return run_id


def _begin(file: Path, head: dict[str, Any], records: list[dict[str, Any]], store: Store) -> str:
    """Continue the run, or begin it where the store does not have it. The file notes its id at once."""
    run_id = store.start(head["name"], head["tags"], head["values"], head["run_id"], head["started_ms"])
    new = file.with_suffix(".new")
    lines = (head | {"run_id": run_id}, *records)
    new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    new.replace(file)
    return run_id


def _send_all(file: Path, head: dict[str, Any], records: list[dict[str, Any]], store: Store) -> None:
    steps = cache(store.steps)
    for record in records:
        _send(record, head, file.with_suffix(""), store, steps)


def _remove(file: Path) -> None:
    file.unlink()
    shutil.rmtree(file.with_suffix(""), ignore_errors=True)


def _lines(file: Path) -> list[dict[str, Any]]:
    """Read a file. A last line that a killed process did not finish is left out."""
    text = file.read_text(encoding="utf-8")
    try:
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        if len(lines) > 1 and {"name", "tags", "values", "run_id", "started_ms", "process"} <= lines[0].keys():
            return lines
    except (ValueError, AttributeError):
        pass
    raise LgpError(f"{file} is damaged, or of an earlier version: its run cannot be sent, remove it")


def _send(
    record: dict[str, Any], head: dict[str, Any], pictures: Path, store: Store, steps: Callable[[str], set[int]]
) -> None:
    match record:
        case {"epochs": rows, "at_ms": at_ms}:
            # a training that was continued logs its earlier epochs again. A row is sent whole, its last value last
            store.log([(epoch, row) for epoch, row in rows if epoch not in steps(next(reversed(row)))], at_ms=at_ms)
        case {"metrics": metrics, "evaluated": evaluated, "at_ms": at_ms}:
            links = store.link(_as_it_is(Evaluated.read(evaluated)), head["arm"], head["task"]) if evaluated else None
            store.log([(0, metrics)], links, at_ms)
        case {"figure": name} if (pictures / name).exists():
            store.client.log_artifact(store.run_id, str(pictures / name))
        case {"tag": tags}:
            for name, value in tags.items():
                store.client.set_tag(store.run_id, name, value)
        case {"upstream": digest}:
            store.tag_upstream(digest)
        case {"encoder": folder, "encoder_digest": digest} if _is_encoder(Path(folder), digest):
            store.register_encoder(Path(folder), {"arm": head["arm"], "encoder_digest": digest})


def _as_it_is(evaluated: Evaluated) -> Evaluated:
    """Leave the encoder out where another one is in its folder by now."""
    there = evaluated.encoder is not None and _is_encoder(evaluated.encoder, evaluated.digest)
    return evaluated if there else Evaluated(None, evaluated.digest, evaluated.inputs)


def _is_encoder(folder: Path, digest: str) -> bool:
    return (folder / WEIGHTS).exists() and encoder_digest(folder) == digest
