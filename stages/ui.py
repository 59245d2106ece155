"""Tool `ui`: the MLflow interface."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, ParamsFile
from stages.paths import kept_results

Port = Annotated[int, typer.Option(min=1, max=65535, help="Of the server, on 127.0.0.1.")]


def ui(port: Port = 5000, params_file: ParamsFile = DEFAULT_PARAMS) -> None:
    """Start the MLflow interface on this project's runs, and print the addresses of its pages."""
    from lgp.errors import LgpError, without_credentials
    from lgp.params.file import load_params
    from lgp.workflow.addresses import compare_address, models_address, runs_address
    from lgp.workflow.mlflow_store import is_own, serve, served_at, store_uri
    from lgp.workflow.restored import log_restored
    from lgp.workflow.tracking import visitor

    params, root = load_params(params_file), Path(os.environ.get("DVC_ROOT", "."))
    run, uri = params.run, store_uri(params.run.tracking_uri, root)
    if not is_own(uri):
        at = without_credentials(uri)
        raise LgpError(f"runs are tracked at {at}: open that address, `lgp ui` serves this project's own store only")
    store = visitor(run.tracking_uri, run.experiment, root)
    restored = log_restored(kept_results(params), store, params_file)
    base, task = served_at(uri, port), f"fewshot-{params.few_labels[0]}"
    found = store.ask(lambda m: (m.experiment_id, m.results(f"tags.task = '{task}'")))

    def announce() -> None:
        print(f"MLflow starts on {base} (about 15 s); Ctrl-C ends it.")
        if restored:
            print(f"{restored} results had no run here: they are logged as restored.")
        if found is not None:
            experiment, results = found
            newest = list({result.arm: result.run_id for result in reversed(results)}.values())
            print(f"Encoders, a chart for each task and metric: {models_address(base, experiment)}")
            print(f"Runs of {task}, the best first: {runs_address(base, experiment, task)}")
            if newest:
                print(f"The newest of each arm, compared: {compare_address(base, experiment, newest)}")
            print("`lgp compare TASK` prints the same for another task, with a table.", flush=True)

    serve(uri, port, announce)
