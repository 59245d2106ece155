"""Tool `repro`: `dvc repro report`, with trainings beside each other where cores are idle."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug

Jobs = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Trainings at a time. Default: what cores and run.threads allow.")
]


def repro(jobs: Jobs = None, debug: Debug = False) -> None:
    """Run what the report of the `arms` needs, as `dvc repro report`, with trainings side by side on idle cores."""
    from lgp.errors import LgpError
    from lgp.params.file import load_params
    from lgp.workflow.pending import REPORT, pending
    from lgp.workflow.side_by_side import at_a_time, run_dvc, run_side_by_side, waiting

    needs = waiting(pending(Path(os.environ.get("DVC_ROOT", "."))))
    if len(needs) > 1 and (at_once := jobs or at_a_time(load_params(DEFAULT_PARAMS).run)) > 1:
        if run_dvc("repro", "prepare", "labels"):
            raise LgpError("what comes before the trainings failed, as said above: mend that and run `lgp repro` again")
        print(f"{len(needs)} trainings, {at_once} at a time: {', '.join(needs)}", flush=True)
        run_side_by_side(needs, at_once)
    raise typer.Exit(run_dvc("repro", REPORT))
