"""What stops a training: Ctrl-C, a scheduler's SIGTERM, or the death of the process that started it."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from lgp.compute.launch import launched

LOOK_EVERY_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A training stopped where it was asked to, its state saved.

    Attributes:
        exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        """Say what stopped it, and where."""
        super().__init__(message)
        self.exit_code = exit_code


class Interruption:
    """Records a request to stop. The training loop reads it between two steps."""

    def __init__(self) -> None:
        """Begin without a request."""
        self.reason = ""
        self.signal = signal.SIGTERM
        self._parents = _what_started_us()
        self._looked = time.monotonic()

    def asked(self) -> bool:
        """Tell whether to stop. About once a second, check that DVC and torchrun are still alive."""
        if not self.reason and time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            gone = [name for name, process in self._parents.items() if not _lives(process)]
            if gone:
                self.reason = f"{gone[0]}, which started it, is gone"
        return bool(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests inside the block. A second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        # torchrun hands on a Ctrl-C that the terminal has sent to all already
        if self.reason == "SIGINT" and number == signal.SIGINT and not launched():
            raise KeyboardInterrupt
        self.reason, self.signal = signal.Signals(number).name, signal.Signals(number)
        if number == signal.SIGINT and not launched():
            print("stopping after this step, to save its state; Ctrl-C again stops at once", file=sys.stderr)


def _what_started_us() -> dict[str, psutil.Process]:
    """Return the processes whose death is to end a training: DVC and torchrun, where they started it.

    DVC sets `DVC_STAGE` for what it starts, so it is the nearest ancestor without it (a shell may lie between).
    """
    parents: dict[str, psutil.Process] = {}
    try:
        ancestors = psutil.Process().parents()
        if launched() and ancestors:
            parents["torchrun"] = ancestors[0]
        if "DVC_STAGE" in os.environ:
            parents["DVC"] = next(p for p in ancestors if "DVC_STAGE" not in p.environ())
    except (psutil.Error, StopIteration):  # not ours to look at
        pass
    return parents


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
