"""Options that the stages share."""

from pathlib import Path
from typing import Annotated

import typer


def _remember_debug(context: typer.Context, debug: bool) -> bool:
    context.find_root().meta["lgp.debug"] = debug
    return debug


ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameter file.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ignore what an interrupted run of this stage left.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember_debug)]
Arm = Annotated[str, typer.Argument(help="Whose encoder: mim, cl or graft.")]
Fraction = Annotated[str, typer.Argument(help="Share of labels: a name in data.few_label_shares, e.g. 1pct.")]

DEFAULT_PARAMS = Path("params.yaml")
