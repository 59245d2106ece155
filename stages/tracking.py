"""Tool `tracking`: runs that MLflow did not take."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile

tracking_app = typer.Typer(help="Runs that MLflow did not take.", no_args_is_help=True)


AllMachines = Annotated[
    bool, typer.Option("--all-machines", help="Also runs whose process on another machine may live.")
]


@tracking_app.command()
def sync(all_machines: AllMachines = False, params_file: ParamsFile = DEFAULT_PARAMS, debug: Debug = False) -> None:
    """Send the runs of .lgp/tracking to the store, which did not answer when they ran."""
    from filelock import FileLock

    from lgp.errors import LgpError, without_credentials
    from lgp.params.file import load_params
    from lgp.workflow.kept_runs import AFTER_REPORT, kept_files, send
    from lgp.workflow.mlflow_store import store_uri
    from lgp.workflow.tracking import visitor

    run, root = load_params(params_file).run, Path(os.environ.get("DVC_ROOT", "."))
    files, left = kept_files(root, all_machines)
    for line in left:
        print(line)
    store = visitor(run.tracking_uri, run.experiment, root)
    tasks: list[str] = []
    if files:
        with FileLock(root / ".lgp" / "sync.lock"):  # two calls at once would send a run twice
            for file in (file for file in files if file.exists()):
                task = store.ask(partial(send, file))
                if task is None:
                    sent = f"{len(tasks)} of {len(files)} runs were sent"
                    raise LgpError(f"{sent}: run it again when the store answers")
                tasks.append(task)
    at = without_credentials(store_uri(run.tracking_uri, root))
    print(f"sent to {at}: {len(tasks)}" if files else "no run waits to be sent")
    if "report" in tasks:
        print(AFTER_REPORT)
