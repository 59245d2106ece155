"""The options that the stages share, and the one line that a failing command prints."""

import io
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lgp.compute import exhaustion
from lgp.compute.interruption import line_and_code, stop_of
from lgp.compute.launch import launched_rank
from lgp.errors import LgpError, escaped, one_line, without_credentials


class OneLineErrors(TyperGroup):
    """Prints a caller's mistake as one line and exits with 1; `--debug` of a stage shows the traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line. What the terminal cannot show is printed as an escape: it stops no stage."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as e:
            line, code = _line_and_code(e)
            if line is None or ctx.find_root().meta.get("lgp.debug"):
                raise
            with suppress(OSError):  # a terminal that closed cannot be written to
                print(line, end="", file=sys.stderr, flush=True)
            raise typer.Exit(code) from None


def _line_and_code(error: BaseException) -> tuple[str | None, int]:
    """Return what is said of an error, and the exit code. None: its traceback is needed."""
    rank = launched_rank()
    if stop := stop_of(error):
        line, code = line_and_code(stop)
        return "" if rank else f"{line}\n", code  # one of several processes says it
    said = exhaustion.said(error) if isinstance(error, OSError | RuntimeError | MemoryError) else None
    if said is None and isinstance(error, LgpError | OSError):
        said = escaped(without_credentials(one_line(error)))
    return said and f"error{f' in process {rank}' if rank else ''}: {said}\n", 1


def print_version(wanted: bool) -> None:
    """Print the version and exit, where `wanted` is true."""
    if wanted:
        from importlib.metadata import version

        print(version("lgp"))
        raise typer.Exit


def _remember_debug(context: typer.Context, debug: bool) -> bool:
    context.find_root().meta["lgp.debug"] = debug
    return debug


def is_arm_name(text: str) -> bool:
    """Return whether a text can be the name of an arm."""
    return re.fullmatch("[a-z][a-z0-9_]*", text) is not None


def _arm_name(arm: str | None) -> str | None:
    if arm is not None and not is_arm_name(arm):
        raise LgpError(f"{arm!r} is no name of an arm: small letters, digits and _ make one, a letter first")
    return arm


ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ignore what an interrupted run of this stage left.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from an interrupted run even if other code wrote its state.")
]
Accept = Annotated[bool, typer.Option("--accept", help="Take the arm as it is if the checks of its training fail.")]
Replay = Annotated[
    int | None,
    typer.Option(
        "--replay", metavar="STEP", help="Repeat this step of the training, from 0, and show it; nothing is written."
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug)]
Arm = Annotated[str, typer.Argument(help="Whose encoder: mim, cl, graft, …", callback=_arm_name)]
ArmName = Annotated[str, typer.Option("--arm", metavar="NAME", help="What to call the arm.", callback=_arm_name)]
OptionalArm = Annotated[
    str | None,
    typer.Option(
        "--arm", metavar="ARM", help="Whose encoder; default: that of graft, else cl, else mim.", callback=_arm_name
    ),
]
Labels = Annotated[
    str,
    typer.Argument(help="Which few labels: 1pct, 10pct, 5shot, …, as in labels.shares, shots and lists."),
]

DEFAULT_PARAMS = Path("params.yaml")
