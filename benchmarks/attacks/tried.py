"""What an attack tries, and whether the tool holds: a correct result, or one clear line."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forks import TRACEBACK, Ended, Fork

LIMIT_S = 60.0


@dataclass(frozen=True)
class Tried:
    """One case.

    Attributes:
        case: what was attacked, and how: a row of the table.
        fault: what the tool did that it must not do; None if it held.
        detail: what is known beside it, for who mends it.
        told: whether it held by one line, and not by a result.
    """

    case: str
    fault: str | None = None
    detail: str = ""
    told: bool = False


class Wrong(Exception):  # noqa: N818 - it says what is the case
    """A result that is not what it must be: a silent difference."""


def fault_of(ended: Ended) -> str | None:
    """Say why the end of a command is none that it may have; None if it may. A result is not looked at.

    A command ends with 0, or with 1 or 2 and an error on one line.
    """
    if ended.hung:
        return f"hangs: ran {ended.seconds:.0f} s"
    if TRACEBACK in ended.output:
        return f"traceback: {ended.last_line}"
    if ended.code not in (0, 1, 2):
        return f"ended with {ended.code}: {ended.last_line}"
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ") and len(line) > len("error: ")]
    if ended.code == 1 and len(errors) != 1:
        return f"ended with 1 and {len(errors)} lines of error: {ended.last_line}"
    return None


def tried(case: str, action: Callable[[], object], folder: Path) -> Tried:
    """Do an action of the library in a fork. It may end, or raise what the command line prints as one line.

    `Wrong` is a silent difference.
    """

    def work() -> int:
        from lgp.errors import LgpError

        try:
            action()
        except (LgpError, OSError) as e:  # the command line prints these, on one line
            print("error:", " ".join(str(e).split()))
            return 1
        return 0

    ended = Fork(work, folder).wait(LIMIT_S)
    fault = fault_of(ended)
    return Tried(case, fault, "" if fault is None else ended.output[-1500:], told=fault is None and ended.code > 0)
