"""The causes that stop a training: Ctrl-C, a scheduler's SIGTERM, or the death of the process that started it."""

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
from lgp.compute.liveness import lives

LOOK_EVERY_S = 1.0


class Interrupted(KeyboardInterrupt):
    """A training stopped on request and saved its state.

    Attributes:
        exit_code: 128 + the signal's number, as in shells.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        """Take the message, which says what stopped the training and where, and the exit code."""
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
        """Return whether to stop. About once a second, check that DVC and torchrun are still alive."""
        if not self.reason and time.monotonic() - self._looked >= LOOK_EVERY_S:
            self._looked = time.monotonic()
            gone = [name for name, process in self._parents.items() if not lives(process)]
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
        # the terminal sends Ctrl-C to every process; torchrun then sends it to its workers a second time
        if self.reason == "SIGINT" and number == signal.SIGINT and not launched():
            raise KeyboardInterrupt
        self.reason, self.signal = signal.Signals(number).name, signal.Signals(number)
        if number == signal.SIGINT and not launched():
            print("stopping after this step to save the state; press Ctrl-C again to stop at once", file=sys.stderr)


def _what_started_us() -> dict[str, psutil.Process]:
    """Return the processes whose death ends a training: DVC and torchrun, if they started it.

    DVC sets the variable `DVC_STAGE` for the processes that it starts. DVC is therefore the nearest ancestor without
    the variable. A shell may be between them.
    """
    parents: dict[str, psutil.Process] = {}
    try:
        ancestors = psutil.Process().parents()
        if launched() and ancestors:
            parents["torchrun"] = ancestors[0]
        if "DVC_STAGE" in os.environ:
            parents["DVC"] = next(p for p in ancestors if "DVC_STAGE" not in p.environ())
    except (psutil.Error, StopIteration):  # no right to read that process
        pass
    return parents
