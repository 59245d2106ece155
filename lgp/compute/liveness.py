"""Whether a process lives: one at hand, or one that wrote its name down."""

import socket
from dataclasses import dataclass

import psutil


def lives(process: psutil.Process) -> bool:
    """Return whether a process runs. One that has ended and waits for its parent does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@dataclass(frozen=True)
class ProcessName:
    """A process of some machine as text: host, number and start. A number that is used again is another process."""

    text: str

    @classmethod
    def own(cls) -> "ProcessName":
        """Return the name of this process."""
        process = psutil.Process()
        return cls(f"{socket.gethostname()} {process.pid} {process.create_time():.2f}")

    def is_here(self) -> bool:
        """Return whether it is a process of this machine."""
        return self.text.rsplit(" ", 2)[0] == socket.gethostname()

    def may_live(self) -> bool:
        """Return whether the process lives. One of another machine may, and so may one whose name is no name."""
        try:
            host, number, start = self.text.rsplit(" ", 2)
            if host != socket.gethostname():
                return True
            process = psutil.Process(int(number))
            return abs(process.create_time() - float(start)) < 1.0 and lives(process)
        except psutil.NoSuchProcess:
            return False
        except ValueError:
            return True
