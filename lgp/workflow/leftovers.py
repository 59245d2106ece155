"""What a project does not need: expired resume states, unused caches, and halves that killed commands left.

Nothing is found that DVC has in a lock file, that an evaluation of the parameters names, or that lies outside of the
project behind a link.
"""

import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import yaml

from lgp.compute.intact import Damaged
from lgp.compute.units import time_text
from lgp.errors import LgpError
from lgp.evaluate.kept_outcomes import KEPT
from lgp.features.of_encoder import CACHE, encoder_source, feature_cache
from lgp.models.encoder_folder import images_for
from lgp.models.files import CLASSIFIERS, ENCODER, WEIGHTS
from lgp.params.file import Params
from lgp.training.left_states import RESUME, LeftState, left_states, remove, unused
from lgp.workflow.ahead import AHEAD
from lgp.workflow.code_digest import code_digests

LOCKS = ("dvc.lock", "controls/dvc.lock")
# where a stage writes first, beside its outputs
PARTIAL_IN = (
    ".",
    ".lgp",
    "data",
    "models",
    "models/*/classifiers",
    "metrics",
    "predictions",
    "reports",
    "reports/conflict",
    str(KEPT),
    str(AHEAD),
)
OF_PROCESS = re.compile(r".+\.(?P<pid>\d+)")  # a file that this process was writing
MIB = 2**20
WRITTEN_WITHIN_S = 3600  # what is younger may still be written, by a tool that holds no lock


@dataclass(frozen=True)
class Leftover:
    """Something that nothing needs.

    Attributes:
        what: a description, for the table.
        paths: files and folders.
        state: the resume state that it is, if any.
    """

    what: str
    paths: tuple[Path, ...]
    state: LeftState | None = None

    def remove(self) -> bool:
        """Remove it. Return False where a training runs that may need it."""
        if self.state is not None:
            with unused(self.state.folder) as free:
                if free:
                    self.state.remove()
                return free
        for path in self.paths:
            remove(path)
        return True


def size_of(paths: Iterable[Path]) -> int:
    """Return the bytes of files and folders. Links count as links."""
    states = (_state(file) for path in paths for file in (path, *_below(path)))
    return sum(state.st_size for state in states if state and not stat.S_ISDIR(state.st_mode))


def _below(folder: Path) -> list[Path]:
    try:
        return [] if folder.is_symlink() else list(folder.rglob("*"))
    except FileNotFoundError:  # a stage that runs has moved it
        return []


def _state(path: Path) -> os.stat_result | None:
    """Return the state of a file, None where a stage that runs has moved it."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def size_text(size: int) -> str:
    """Write a number of bytes in MiB."""
    return f"{size / MIB:,.1f} MiB"


def age_text(paths: Iterable[Path]) -> str:
    """Write how long ago the newest of files and folders changed."""
    newest = max((state.st_mtime for path in paths if (state := _state(path))), default=time.time())
    return time_text(max(0.0, time.time() - newest) / 3600)


def is_expired(state: LeftState, digests: dict[str, str]) -> bool:
    """Return whether other code than the present one wrote a resume state."""
    return not state.is_of(digests.get(state.stage))


def leftovers(root: Path, params: Params, prepared: Path, labels: Path, waiting: bool) -> list[Leftover]:
    """Return what the project `root` does not need.

    Args:
        root: of the project, the current folder.
        params: of the project.
        prepared: folder of the prepared images.
        labels: folder of their labels.
        waiting: also resume states of the present code.
    """
    needed = _needed(root)
    found = [
        *_states(root, waiting),
        *_features(root, params, prepared, labels),
        *_outcomes(root),
        *_ahead(root),
        *_partial(root),
        *_unnamed(root, params),
    ]
    return [left for left in found if all(_is_free(path, root, needed) for path in left.paths)]


def _needed(root: Path) -> set[Path]:
    """Return the outputs that DVC has in its lock files. Raise `LgpError` where one cannot be read."""
    outputs: set[Path] = set()
    for file in (root / name for name in LOCKS):
        try:
            stages = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"] if file.exists() else {}
            # the stages in controls/ run in the folder above
            outputs |= {Path(out["path"]) for stage in stages.values() for out in stage.get("outs", [])}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, AttributeError):
            raise LgpError(
                f"{file} cannot be read, so nothing is known to be unneeded: `git checkout {file}`"
            ) from None
    return {Path(os.path.normpath(root / path)) for path in outputs}


def _is_free(path: Path, root: Path, needed: set[Path]) -> bool:
    """Return whether a path lies in the project, also behind links, and is, contains or is inside no needed output."""
    inside = path.parent.resolve().is_relative_to(root.resolve())
    here = Path(os.path.normpath(path))
    return inside and not any(here.is_relative_to(out) or out.is_relative_to(here) for out in needed)


def _states(root: Path, waiting: bool) -> Iterator[Leftover]:
    digests = code_digests(root)
    for state in left_states(root / RESUME):
        expired = is_expired(state, digests)
        if expired or waiting:
            of = "other code" if expired else "this code"
            yield Leftover(f"resume state of {of}: {state.training}", state.files, state)
        elif torn := tuple(file for file in state.files if file.suffix == ".new"):
            yield Leftover(f"half a resume state: {state.training}", torn, replace(state, files=torn))


def _features(root: Path, params: Params, prepared: Path, labels: Path) -> Iterator[Leftover]:
    entries = [entry for entry in (root / CACHE).glob("*/") if not entry.is_symlink()]
    used = _used_entries(root, params, prepared, labels) if entries else set()
    for entry in sorted(entries):
        if entry.suffix:
            if time.time() - entry.stat().st_mtime < WRITTEN_WITHIN_S:
                continue
            yield Leftover("half a folder of features", (entry,))
        elif used is not None and entry.name not in used:
            yield Leftover("features of an encoder or of images that are not there any more", (entry,))


def _used_entries(root: Path, params: Params, prepared: Path, labels: Path) -> set[str] | None:
    """Return the names of the folders of features that encoders of this project read; None where that is unknown."""
    from lgp.data.labels import LabelledImages
    from lgp.features.extraction import all_runnings

    cache, used = feature_cache(params), set()
    try:
        data = LabelledImages(root / prepared, root / labels)
    except LgpError:  # nothing is prepared, or it is damaged: a stage says so
        return None
    for encoder in (file.parent for file in sorted((root / "models").glob(f"*/{ENCODER}/{WEIGHTS}"))):
        try:
            images = images_for(encoder, data)
            for running in all_runnings():
                used.add(cache.entry_of(encoder_source(encoder, params.features, running), images).name)
        except Damaged:
            return None
        except LgpError:  # it takes images of another size: it has no features of these
            continue
    return used


def _outcomes(root: Path) -> Iterator[Leftover]:
    for file in sorted((root / KEPT).glob("[a-z]*.*")):
        arm = file.name.partition("-")[0]
        if not (root / "models" / arm / ENCODER).exists():
            yield Leftover(f"outcome of the arm {arm}, which is not there any more", (file,))


def _ahead(root: Path) -> Iterator[Leftover]:
    for place in sorted((root / AHEAD).glob("[a-z]*/")):
        if time.time() - place.stat().st_mtime < WRITTEN_WITHIN_S:  # `dvc repro` may run, and take it
            continue
        yield Leftover("an evaluation that was computed ahead, and that no stage has asked for", (place,))


def _partial(root: Path) -> Iterator[Leftover]:
    """Find what a stage or a tool was writing as it was killed."""
    for folder in PARTIAL_IN:
        for path in sorted(root.glob(f"{folder}/.partial.*")):
            yield Leftover("half an output of a killed stage", (path,))
    for path in sorted((root / ".lgp").glob("*.*")) + sorted((root / ".lgp" / "checked").glob("*.*")):
        found = OF_PROCESS.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found["pid"])):
            yield Leftover("half a note of a killed process", (path,))


def _unnamed(root: Path, params: Params) -> Iterator[Leftover]:
    """Find predictions and classifiers that no arm and task of the parameters makes, and that have no metrics."""
    named = {f"{arm}-{task}" for arm in params.arms for task in params.tasks_of(arm)}
    classifiers = (root / "models").glob(f"*/{CLASSIFIERS}/*/")
    found = [(f"{path.parent.parent.name}-{path.name}", path) for path in classifiers]
    found += [(path.stem, path) for path in (root / "predictions").glob("*.parquet")]
    for name, path in sorted(found):
        if name not in named and not path.name.startswith(".") and not (root / "metrics" / f"{name}.json").exists():
            yield Leftover(f"{'predictions' if path.suffix else 'classifier'} without metrics: {name}", (path,))
