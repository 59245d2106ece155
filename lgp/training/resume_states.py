"""Resume states: an interrupted training continues from them. Light: torch is imported with the first state."""

import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from lgp.compute.interruption import Interrupted, Interruption
from lgp.errors import LgpError

DIGEST_BYTES = 32
PIECE_BYTES = 2**20  # read at once
LOOKED_AT_S = 0.5  # `lgp status` holds a lock for a moment, to see whether it is free


class _Digesting:
    """A file that digests its content. It keeps its `OSError`, which `torch.save` replaces by another error."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self.file.flush()


def _is_whole(path: Path) -> bool:
    """Return whether a file is there and ends with the digest of its content. It is read piece by piece."""
    if not path.exists():
        return False
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size - DIGEST_BYTES
        while left > 0 and (piece := file.read(min(PIECE_BYTES, left))):
            sha256.update(piece)
            left -= len(piece)
        return sha256.digest() == file.read()


def _mapped(path: Path) -> dict[str, Any]:
    """Return a state whose tensors lie in its file. What is written to them is not written to the file."""
    import torch

    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


def _holder(lock: FileLock) -> str:
    """Return the id of the process that has a lock."""
    holder = Path(lock.lock_file).with_suffix(".pid")
    return holder.read_text(encoding="utf-8").strip() if holder.exists() else "unknown"


def _take(lock: FileLock, timeout_s: float) -> None:
    """Take a lock and note this process as its holder. Raise `LgpError` if another has it for `timeout_s`."""
    try:
        lock.acquire(timeout=timeout_s)  # it looks every 0.05 s
    except Timeout:
        raise LgpError(
            f"process {_holder(lock)} is training the same thing (it holds {lock.lock_file}): wait for it, or stop it"
        ) from None
    Path(lock.lock_file).with_suffix(".pid").write_text(f"{os.getpid()}\n", encoding="utf-8")


class StateStore:
    """The resume state of one training, under locks. It writes two files in turn. Each ends with its digest.

    The digest reveals a torn state (power loss in the middle of a write). The state before it is then used. Other code
    writes files of other names. Its states are kept. They are used only on request (`adopt`).
    """

    def __init__(self, folder: Path, code_digest: str) -> None:
        """Keep states of this code in `folder`. The folder is made at its first use."""
        self.folder = folder
        self.latest = folder / f"state-{code_digest[:16]}.pt"
        self.previous = self.latest.with_suffix(".previous.pt")
        self.run_id_file = folder / f"run_id-{code_digest[:16]}"
        self.adopted_file = folder / f"adopted-{code_digest[:16]}"
        # one lock per result (the same stage in the same folder), one per state (the same parameters and inputs);
        # DVC's experiments run in their own folders and share the states of this folder
        here = hashlib.sha256(os.getcwd().encode()).hexdigest()[:16]
        self._of_result = FileLock(folder.parent / f"in-{here}.lock")
        self._of_state = FileLock(folder.parent / f"{folder.name}.lock")
        self._code_digest = code_digest
        self._writing = threading.Lock()

    def part(self, name: str) -> "StateStore":
        """Return the store of one of several trainings of a stage. They share the locks and are closed together."""
        part = StateStore(self.folder / name, self._code_digest)
        part._of_result, part._of_state, part._writing = self._of_result, self._of_state, self._writing
        return part

    def acquire(self, waits: bool = False) -> None:
        """Take the locks.

        Args:
            waits: wait while the same training runs in another folder, as of an experiment of DVC's queue.

        Raises:
            LgpError: another process has a lock that is not waited for. The message names it.
            Interrupted: what started this process ended during the wait.
        """
        interruption = Interruption()  # it knows DVC only while DVC lives
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            _take(self._of_result, LOOKED_AT_S)
            try:
                _take(self._of_state, LOOKED_AT_S)
            except LgpError:
                if not waits:
                    raise
                print(
                    f"{self.folder.parent.name}: process {_holder(self._of_state)} is training the same thing in "
                    "another folder: waiting for its end",
                    flush=True,
                )
                self._wait(interruption)
        except BaseException:  # a stop, too, ends the wait
            self._release()
            raise
        self.folder.mkdir(exist_ok=True)  # by now: the training before may have removed it at its end

    def _wait(self, interruption: Interruption) -> None:
        while True:
            try:
                return _take(self._of_state, LOOKED_AT_S)
            except LgpError:
                if interruption.asked():
                    raise Interrupted(
                        f"{self.folder.parent.name}: stopped while it waited ({interruption.reason}): run the same "
                        "command again",
                        128 + interruption.signal,
                    ) from None

    def _release(self) -> None:
        self._of_state.release()
        self._of_result.release()

    def adopt(self) -> None:
        """Take over the newest state that other code wrote, if this code has none.

        Raises:
            LgpError: there is none.
        """
        if self.has_state():
            return
        newest: dict[Path, Path] = {}
        for path in sorted(self.folder.rglob("state-*.pt"), key=lambda path: path.stat().st_mtime):
            if _is_whole(path):
                newest[path.parent] = path
        if not newest:
            raise LgpError(f"nothing to resume: no whole state of these parameters and inputs in {self.folder}")
        writers = {state.name.removeprefix("state-").split(".")[0] for state in newest.values()}
        self.adopted_file.write_text(", ".join(sorted(writers)), encoding="utf-8")
        for folder, state in newest.items():
            copied = folder / f"{self.latest.stem}.new"
            shutil.copy(state, copied)
            copied.replace(folder / self.latest.name)

    def adopted(self) -> str | None:
        """Return the digest of the other code whose state this training took over, None if it took over none."""
        return self.adopted_file.read_text(encoding="utf-8") if self.adopted_file.exists() else None

    def save(self, state: dict[str, Any]) -> None:
        """Write a state durably (write, fsync, rename, fsync the folder).

        Raises:
            OSError: the file system raised it. Earlier states stay usable.
        """
        with self._writing:
            self._save(state)

    def _save(self, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.latest.with_suffix(".new")
        try:
            with new.open("wb") as file:
                self._write(state, file)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        if self.latest.exists():
            self.latest.replace(self.previous)
        new.replace(self.latest)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @staticmethod
    def _write(state: dict[str, Any], file: BinaryIO) -> None:
        import torch

        digesting = _Digesting(file)
        try:
            torch.save(state, digesting)  # type: ignore[arg-type]  # it only writes and flushes
        except RuntimeError:
            if digesting.error is None:
                raise
            raise digesting.error from None
        file.write(digesting.sha256.digest())
        file.flush()
        os.fsync(file.fileno())

    def read(self) -> dict[str, Any] | None:
        """Return the newest whole state, or None. Its tensors lie in the file: copy those that are to be kept."""
        for path in (self.latest, self.previous):
            if _is_whole(path):
                return _mapped(path)
            path.unlink(missing_ok=True)  # a torn file must not replace a whole one at the next save
        return None

    def has_state(self) -> bool:
        """Return whether an interrupted training left a state."""
        return any(self.folder.rglob(f"{self.latest.stem}*.pt"))

    def forget(self) -> None:
        """Remove the states of this code, of all parts."""
        for path in (*self.folder.rglob(f"{self.latest.stem}.*"), self.adopted_file):
            path.unlink(missing_ok=True)

    def close(self, succeeded: bool) -> None:
        """Release the locks. Remove the states after success. Remove the folder if no state is left in it.

        It waits for a state that a thread is writing. Where a stop ends this wait, the locks are held until the process
        ends, which waits for its threads.
        """
        with self._writing:
            if succeeded:
                self.forget()
            if not self.has_state():
                self.run_id_file.unlink(missing_ok=True)
            if not any(self.folder.rglob("state-*")):
                shutil.rmtree(self.folder, ignore_errors=True)
            self._release()


class EarlierStates(StateStore):
    """The resume states of a training up to a step, for a replay. They are read without a lock, and never changed."""

    def __init__(self, of: StateStore, last: float) -> None:
        """Read the states of the store `of` that are not later than step `last`."""
        self.folder, self.latest, self.previous, self.last = of.folder, of.latest, of.previous, last

    def read(self) -> dict[str, Any] | None:
        """Return the newest whole state that is not later. One of a training that ended early is left out."""
        for path in (self.latest, self.previous):
            try:
                file = path.open("rb")
            except FileNotFoundError:
                continue
            with file:
                # a training may give the name to another state, and does not write to this one
                opened = Path(f"/dev/fd/{file.fileno()}")
                state = _mapped(opened) if _is_whole(opened) else None
            if state and state["progression"]["step"] <= self.last and not state["progression"]["ended_early"]:
                return state
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Save nothing."""
