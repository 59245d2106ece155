"""Options that the stages share."""

import re
from pathlib import Path
from typing import Annotated

import typer

from lgp.errors import LgpError


def _remember_debug(context: typer.Context, debug: bool) -> bool:
    context.find_root().meta["lgp.debug"] = debug
    return debug


def _arm_name(arm: str) -> str:
    if not re.fullmatch("[a-z][a-z0-9_]*", arm):
        raise LgpError(f"{arm!r} is no name of an arm: small letters, digits and _ make one, a letter first")
    return arm


ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ignore what an interrupted run of this stage left.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from an interrupted run even if other code wrote its state.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug)]
Arm = Annotated[str, typer.Argument(help="Whose encoder: mim, cl, graft, …", callback=_arm_name)]
ArmName = Annotated[str, typer.Option("--arm", metavar="NAME", help="What to call the arm.", callback=_arm_name)]
Labels = Annotated[
    str, typer.Argument(help="Which few labels: 1pct, 10pct, 5shot, …, as in data.few_label_shares, _shots and _lists.")
]

DEFAULT_PARAMS = Path("params.yaml")
