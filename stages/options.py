"""Options that the stages share."""

from pathlib import Path
from typing import Annotated

import typer

from lgp.errors import LgpError
from stages.paths import ARMS


def _remember_debug(context: typer.Context, debug: bool) -> bool:
    context.find_root().meta["lgp.debug"] = debug
    return debug


def _known_arm(arm: str) -> str:
    if arm not in ARMS:
        raise LgpError(f"unknown arm {arm!r}: choose one of {', '.join(ARMS)}")
    return arm


ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ignore what an interrupted run of this stage left.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug)]
Arm = Annotated[str, typer.Argument(help="Whose encoder: mim, cl or graft.", callback=_known_arm)]
Fraction = Annotated[str, typer.Argument(help="Share of labels: a name in data.few_label_shares, e.g. 1pct.")]

DEFAULT_PARAMS = Path("params.yaml")
