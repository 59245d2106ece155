"""The causes that stop a command: Ctrl-C, SIGTERM, SIGHUP, or the death of the process that started a training."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING

from lgp.compute.launch import launched
from lgp.compute.liveness import lives

if TYPE_CHECKING:
    import psutil

LOOK_EVERY_S = 1.0
SEND_AGAIN_S = 0.02
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a terminal that closes sends the last
GO_ON = "run the same command again, a training goes on from its last state"


class Interrupted(KeyboardInterrupt):
    """A command stopped on request. A training has saved its state.

    Attributes:
        exit_code: 128 + the signal's number, as in shells.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        """Take the message, which says what stopped the command and where, and the exit code."""
        super().__init__(message)
        self.exit_code = exit_code


class _Unsaid:
    """The signal that asked this process to stop, until the command says so."""

    number: int | None = None


def stop_of(error: BaseException) -> KeyboardInterrupt | None:
    """Return the stop that an error is, None if it is none.

    Where a signal falls into the code of a library, the library may raise an error of its own in place of the stop. So
    the error that ends a command after a signal is the stop, whatever it is.
    """
    if isinstance(error, KeyboardInterrupt):
        return error
    ended_well = (isinstance(error, SystemExit) and not error.code) or getattr(error, "exit_code", None) == 0
    return None if _Unsaid.number is None or ended_well else _stop(_Unsaid.number)


def line_and_code(stop: KeyboardInterrupt) -> tuple[str, int]:
    """Return what a command says that was stopped, and its exit code. Ctrl-C says and has nothing of its own."""
    _Unsaid.number = None
    return str(stop) or f"stopped by Ctrl-C: {GO_ON}", getattr(stop, "exit_code", 128 + signal.SIGINT)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """End the process in one line when SIGINT, SIGTERM or SIGHUP stops the block.

    After the block, each of them ends the process at once and prints nothing. An ignored signal stays ignored, as
    `nohup` ignores SIGHUP.
    """
    for number in ASKING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _interrupt)
    hook, sys.unraisablehook = sys.unraisablehook, _send_again
    try:
        yield
    except BaseException as e:
        stop = stop_of(e)
        if stop is None:
            raise
        line, code = line_and_code(stop)  # the stop came before or after the command itself, which prints its own line
        print(line, file=sys.stderr)
        sys.exit(code)
    finally:
        sys.unraisablehook = hook
        # at its end Python would print a traceback
        for number in ASKING:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, signal.SIG_DFL)


@contextmanager
def stops_held() -> Iterator[Callable[[], None]]:
    """Hold a request to stop until the block ends. A process that the block starts is known by then, and is told.

    A mask of this thread would not hold it: the kernel gives a signal to any thread that does not mask it, and Python
    runs the handler in the main thread. In other threads no handler runs, so nothing is held there.

    Yields:
        A function for a fork that begins in the block. The fork calls it to take requests from there on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    asked: list[int] = []
    # an ignored signal stays ignored, also in a command that begins in the block
    heard = [number for number in ASKING if callable(signal.getsignal(number))]
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in heard}

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        while asked:
            signal.raise_signal(asked.pop(0))

    try:
        yield release
    finally:
        release()


def _interrupt(number: int, _: FrameType | None) -> None:
    _Unsaid.number = number
    raise _stop(number)


def _stop(number: int) -> KeyboardInterrupt:
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return Interrupted(f"stopped by {signal.Signals(number).name}: {GO_ON}", 128 + number)


def _send_again(lost: "sys.UnraisableHookArgs") -> None:
    """Send a signal again whose error was lost, because it came while Python cleaned up an object."""
    error = lost.exc_value
    if not isinstance(error, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    number = error.exit_code - 128 if isinstance(error, Interrupted) else signal.SIGINT
    threading.Timer(SEND_AGAIN_S, os.kill, (os.getpid(), number)).start()


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
        """Take signals as requests inside the block. A second Ctrl-C ends it. `nohup` keeps ignoring SIGHUP."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [number for number in ASKING if number != signal.SIGHUP or not ignored]
        before = {number: signal.signal(number, self._note) for number in heard}
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
            print(
                "stopping after this step to save the state; press Ctrl-C again to stop without saving", file=sys.stderr
            )


@cache
def _what_started_us() -> dict[str, "psutil.Process"]:
    """Return the processes whose death ends a training: DVC and torchrun, if they started it.

    DVC sets the variable `DVC_STAGE` for the processes that it starts. DVC is therefore the nearest ancestor without
    the variable. A shell may be between them. It is looked up once: where DVC dies, it is no ancestor any more.
    """
    import psutil

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
