"""Whether a process lives: one at hand, or one that wrote its name down."""

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a command that tracks nothing does not import it
    import psutil


def lives(process: "psutil.Process") -> bool:
    """Return whether a process runs. One that has ended and waits for its parent does not."""
    import psutil

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
        import psutil

        process = psutil.Process()
        return cls(f"{socket.gethostname()} {process.pid} {process.create_time():.2f}")

    def is_here(self) -> bool:
        """Return whether it is a process of this machine."""
        return self.text.rsplit(" ", 2)[0] == socket.gethostname()

    def may_live(self) -> bool:
        """Return whether the process lives, as far as this machine knows. One of another machine may, or no name."""
        import psutil

        if not self.is_here():
            return True
        try:
            _, number, start = self.text.rsplit(" ", 2)
            process = psutil.Process(int(number))
            return abs(process.create_time() - float(start)) < 1.0 and lives(process)
        except psutil.NoSuchProcess:
            return False
        except ValueError:
            return True
