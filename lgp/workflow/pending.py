"""What `lgp repro` would run, and why, in plain words. DVC is asked; nothing is written.

DVC compares files that its stage `inputs` writes. Here they are written to a temporary folder, so that an edit of the
code or of a source is noticed before that stage has run.
"""

import hashlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lgp.errors import LgpError, one_line
from lgp.workflow.inputs import FOLDER, PARAMS_FILE, write_inputs
from lgp.workflow.origins import flatten

PIPELINE = "dvc.yaml"
INPUTS = "inputs"  # the stage that always runs
REPORT = "report"  # the stage that is asked for: a training that none of its arms needs does not run
SHOWN_KEYS = 3  # of the parameters that changed
SOURCES = {
    "images": "images of the source came, went or changed",
    "labels": "labels of the source, a table of labels or a list changed",
}
OUTPUTS = {
    "deleted": "is missing",
    "modified": "is not as the stage wrote it",
    "not in cache": "is not in DVC's cache",
}
NOT_YET = "it has not run yet"


@dataclass(frozen=True)
class Pending:
    """What `lgp repro` would do.

    Attributes:
        changed: stage → the reasons why it would run.
        behind: stages that read what these write. Each runs if that changes.
        needs: stage → all stages whose outputs it reads, itself or through others.
    """

    changed: Mapping[str, list[str]]
    behind: list[str]
    needs: Mapping[str, Set[str]] = field(default_factory=dict, compare=False)


def pending(root: Path) -> Pending:
    """Ask DVC what `lgp repro` would run in the project `root`, the current folder.

    Raises:
        LgpError: DVC cannot say: there is no DVC repository or no pipeline with a report, or DVC works on it at the
            moment.
    """
    if not (root / PIPELINE).exists():
        raise LgpError(f"there is no {PIPELINE} here: `lgp init` makes a folder a project")
    try:
        from dvc.exceptions import DvcException
        from dvc.lock import LockError
        from dvc.repo import Repo
    except ImportError as e:
        raise LgpError(f"DVC cannot be imported ({e}): install it") from None
    try:
        with Repo(str(root)) as repo, TemporaryDirectory() as folder:
            write_inputs(Path(folder), PARAMS_FILE, root)
            graph = repo.index.graph  # from each stage to those that it reads from
            needs, changed = _needs(graph), {}
            if REPORT not in needs:
                raise LgpError(
                    f"{PIPELINE} has no stage {REPORT}: copy {PIPELINE} from a project that `lgp init` makes"
                )
            wanted = {REPORT, *needs[REPORT]} - {INPUTS}
            said = repo.status(targets=[REPORT], with_deps=True)
            for stage in (stage for stage in graph if stage.addressing in wanted):
                if reasons := list(_reasons(stage, said.get(stage.addressing, []), Path(folder))):
                    changed[stage.addressing] = reasons
            return Pending(changed, sorted(wanted & _behind(graph, changed)), needs)
    except LockError:
        raise LgpError("DVC cannot say what it would run while it runs: ask again afterwards") from None
    except DvcException as e:
        raise LgpError(f"DVC cannot say what it would run: {one_line(e)}") from None


def _behind(graph: Any, changed: Mapping[str, Any]) -> Set[str]:
    import networkx

    of_name = {stage.addressing: stage for stage in graph}
    found = {reader.addressing for name in changed for reader in networkx.ancestors(graph, of_name[name])}
    return found - changed.keys()


def _needs(graph: Any) -> dict[str, Set[str]]:
    import networkx

    return {stage.addressing: {s.addressing for s in networkx.descendants(graph, stage)} for stage in graph}


def _reasons(stage: Any, said: list[Any], inputs: Path) -> Iterator[str]:
    """Yield why a stage would run, from DVC's own words and the fresh `inputs`."""
    if all(dependency.hash_info.value is None for dependency in stage.deps):
        yield NOT_YET
        return
    yield from _changed_inputs(stage, inputs)
    for change in said:
        if not isinstance(change, dict):
            if change == "changed command":
                yield "its command in dvc.yaml changed"
            continue
        for path, how in change.get("changed deps", {}).items():
            if isinstance(how, dict):
                yield f"parameters changed: {_changed_keys(stage, path)}"
            elif not path.startswith(f"{FOLDER}/"):
                yield f"{path} {'is missing' if how == 'deleted' else 'changed'}"
        for path, how in change.get("changed outs", {}).items():
            yield f"its output {path} {OUTPUTS.get(how, how)}"


def _changed_inputs(stage: Any, inputs: Path) -> Iterator[str]:
    for dependency in stage.deps:
        path = Path(dependency.def_path)
        if FOLDER not in path.parents:
            continue
        now = inputs / path.relative_to(FOLDER)
        if not now.exists():
            yield f"dvc.yaml names {path}, which this code does not write"
            continue
        if hashlib.md5(now.read_bytes()).hexdigest() != dependency.hash_info.value:
            yield SOURCES.get(path.name, "its code changed")


def _changed_keys(stage: Any, path: str) -> str:
    """Return the parameters that changed, with the value before and the value now."""
    (dependency,) = (d for d in stage.deps if d.def_path == path and hasattr(d, "params"))
    before, now = flatten(dependency.hash_info.value or {}), flatten(dependency.read_params())
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    shown = [f"{key} {before.get(key, 'not set')} → {now.get(key, 'not set')}" for key in keys[:SHOWN_KEYS]]
    more = [f"{len(keys) - SHOWN_KEYS} more"] if len(keys) > SHOWN_KEYS else []
    return ", ".join(shown + more)
