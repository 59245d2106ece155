"""Tool `compare`: all tracked runs of a task in one table, and the page of MLflow that compares them."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile
from stages.paths import kept_results

Task = Annotated[
    str | None, typer.Argument(help="linear, fewshot-1pct, …; default: the first of few_labels on frozen features.")
]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Of `lgp ui`, where the store is the project's own.")]


def compare(
    task: Task = None, port: Port = 5000, params_file: ParamsFile = DEFAULT_PARAMS, debug: Debug = False
) -> None:
    """Print a table of a task over arms, policies and seeds, and the address of the page that compares its runs."""
    from lgp.errors import LgpError, without_credentials
    from lgp.params.file import load_params
    from lgp.report.terminal import print_table
    from lgp.workflow.addresses import compare_address
    from lgp.workflow.comparison import HEADER, grouped, rows
    from lgp.workflow.mlflow_store import served_at, store_uri
    from lgp.workflow.restored import log_restored
    from lgp.workflow.tracking import visitor

    params, root = load_params(params_file), Path(os.environ.get("DVC_ROOT", "."))
    task, run = task or f"fewshot-{params.few_labels[0]}", params.run
    store = visitor(run.tracking_uri, run.experiment, root)
    log_restored(kept_results(params), store, params_file)
    found = store.ask(lambda m: (m.experiment_id, m.results(f"tags.task = '{task}'")))
    experiment, groups = (found[0], grouped(found[1])) if found else ("", [])
    if not groups:
        tasks = dict.fromkeys(name for arm in params.arms for name in params.tasks_of(arm))
        raise LgpError(f"no finished run of {task} is tracked: `dvc repro` makes those of {', '.join(tasks)}")
    print_table(f"{task}: top-1 on test, %", HEADER, rows(groups, store.predictions_of))
    print("Intervals: 95 %, over seeds where there are several (Student's t), else over test images and label subsets.")
    print(
        "Behind the first: paired by seed; of a single seed by label subset and image. Not corrected for their number."
    )
    runs = [result.run_id for group in groups for result in group.by_seed.values()]
    base = served_at(without_credentials(store_uri(run.tracking_uri, root)), port)
    print(f"In MLflow (`lgp ui` serves it): {compare_address(base, experiment, runs)}")
