"""Forks of this process: each case runs in one, with its own memory limit, clock and output.

What a fork imports, this process imports after it, so that the next forks have it. A fork takes some 30 ms, a new
process that imports torch and MLflow 5 s.
"""

import atexit
import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO

GIB = 2**30
MEMORY_BYTES = 8 * GIB  # of address space, beside what this process has
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Ended:
    """How a fork ended.

    Attributes:
        code: exit code, or minus the number of the signal that ended it.
        output: all that it printed.
        seconds: how long it ran.
        hung: whether it was killed because it ran past its limit.
    """

    code: int
    output: str
    seconds: float
    hung: bool = False

    @property
    def last_line(self) -> str:
        """The last line that it printed."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


class Fork:
    """A running fork."""

    def __init__(self, work: Callable[[], int], folder: Path) -> None:
        """Begin to `work` in `folder`. What it returns is the exit code."""
        sys.stdout.flush()
        sys.stderr.flush()
        # not in the folder, which is attacked
        self._output, self._imported = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - see `wait`
        self.started = time.monotonic()
        # a signal that comes before the work has begun waits
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        self.pid = os.fork()
        if not self.pid:
            _run(work, folder, self._output.fileno(), self._imported.fileno())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if not self.ended():
            os.kill(self.pid, number)

    def ended(self) -> bool:
        """Return whether it has ended. It stays to be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, limit_s: float = 120.0) -> Ended:
        """Wait for its end. It is killed after `limit_s` more seconds."""
        until, hung, pause = time.monotonic() + limit_s, False, 0.0005
        while not self.ended():
            if time.monotonic() > until and not hung:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(pause)
            pause = min(0.02, pause * 1.5)
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self.started
        output = _content(self._output).decode("utf-8", "backslashreplace")
        import_all(_content(self._imported).decode().splitlines())
        return Ended(os.waitstatus_to_exitcode(status), output, seconds, hung)


def _content(file: IO[bytes]) -> bytes:
    with file:
        file.seek(0)
        return file.read()


def import_all(names: Iterable[str]) -> None:
    """Import modules in this process."""
    for name in names:
        with suppress(Exception):
            import_module(name)


def remember() -> None:
    """Fill what libraries keep once per process: MLflow's list of packages, fonts of Matplotlib, Pillow's formats."""
    from matplotlib.figure import Figure
    from mlflow.utils.requirements_utils import _init_modules_to_packages_map
    from PIL import Image

    _init_modules_to_packages_map()
    figure = Figure()
    figure.text(0.5, 0.5, "a")
    figure.savefig(io.BytesIO())
    Image.init()


def take_signals() -> None:
    """Take signals in a fork from here on. Those that came before it fall into what follows."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _run(work: Callable[[], int], folder: Path, output: int, imported: int) -> None:
    """Be the fork: never return."""
    code, before = 70, set(sys.modules)
    try:
        os.setsid()
        atexit._clear()  # what the parent does at its end is not for its forks
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (
            open(number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            for number in (1, 2)
        )
        os.chdir(folder)
        random.seed()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in STOPPING:  # `nohup` and `&` of a shell let them be ignored
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = work()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:  # noqa: BLE001 - a fork must not go on as this process
        traceback.print_exc()
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(imported, "\n".join(sys.modules.keys() - before).encode())
        os._exit(code)
