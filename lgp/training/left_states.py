"""What interrupted trainings left: resume states of this and of other code, and the stages that run now.

A stage that succeeds removes the states that other code wrote of the same training: they have expired.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

RESUME = Path(".lgp") / "resume"
CODE_CHARACTERS = 16  # of the digest of the code, in the names of files


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there. A link is removed, not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class LeftState:
    """What one code left of one interrupted training, in all its parts.

    Attributes:
        folder: of the training, its parameters and inputs.
        code: the first characters of the digest of that code.
        files: files, and the folder in which `lgp prepare` keeps its work.
    """

    folder: Path
    code: str
    files: tuple[Path, ...]

    @property
    def arm(self) -> str:
        """The arm that is trained; `data` for prepared images."""
        return self.folder.parent.name.partition("-")[0]

    @property
    def task(self) -> str:
        """Pretrain, finetune-10pct, prepare, and so on."""
        return self.folder.parent.name.partition("-")[2]

    @property
    def training(self) -> str:
        """The arm and its task, as text."""
        return f"{self.arm} / {self.task}"

    @property
    def stage(self) -> str:
        """The name of the stage."""
        return self.arm if self.task == "pretrain" else self.task.partition("-")[0]

    @property
    def command(self) -> str:
        """The command that trains."""
        labels = self.task.partition("-")[2]
        arm = "" if self.stage in (self.arm, "prepare") else self.arm
        return " ".join(filter(None, ["lgp", self.stage, arm, labels]))

    def is_of(self, code: str | None) -> bool:
        """Return whether the code with this digest wrote it. None: a stage that the code does not have."""
        return code is not None and code[:CODE_CHARACTERS] == self.code

    def remove(self) -> None:
        """Remove the files, and the folder if nothing else is left in it."""
        for path in self.files:
            remove(path)
        if not any(self.folder.rglob("state-*")):
            shutil.rmtree(self.folder, ignore_errors=True)


def left_states(resume: Path) -> list[LeftState]:
    """Return all states below the folder `resume`."""
    return [left for folder in sorted(resume.glob("*-*/*/")) for left in states_in(folder)]


def states_in(folder: Path) -> list[LeftState]:
    """Return the states of a training, one for each code that wrote any."""
    of_code: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("state-*")):
        of_code.setdefault(path.name.removeprefix("state-").split(".")[0], []).append(path)
    for code, files in of_code.items():
        files += [path for name in ("run_id", "adopted") if (path := folder / f"{name}-{code}").exists()]
    return [LeftState(folder, code, tuple(files)) for code, files in of_code.items()]


def expire(folder: Path, code: str) -> None:
    """Remove the states of a finished training that other code than that of this digest wrote, and say so."""
    expired = [left for left in states_in(folder) if not left.is_of(code)]
    try:
        for left in expired:
            left.remove()
    except OSError as e:  # the stage is done, and its results stand
        print(f"warning: a resume state of other code cannot be removed ({e})", flush=True)
        return
    if expired:
        said = "the resume state that other code wrote of this training is removed"
        print(f"{folder.parent.name.replace('-', ' / ', 1)}: finished: {said}", flush=True)


def running(resume: Path) -> list[str]:
    """Return the stages that run now, as text: name and process id."""
    found = []
    for holder in sorted(resume.glob("*-*/*.pid")):
        if holder.name.startswith("in-"):  # the lock of a folder, beside that of a training
            continue
        with unused(holder.with_suffix("")) as free:
            if not free:
                found.append(f"{holder.parent.name} (process {holder.read_text(encoding='utf-8').strip()})")
    return found


@contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Keep trainings out of a folder of states during the block. The value is False where one runs in it."""
    lock = FileLock(folder.parent / f"{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
