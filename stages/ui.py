"""Tool `ui`: the MLflow interface."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, ParamsFile

Port = Annotated[int, typer.Option(help="Of the server, on 127.0.0.1.")]


def ui(port: Port = 5000, params_file: ParamsFile = DEFAULT_PARAMS) -> None:
    """Start the MLflow interface on this project's runs."""
    from lgp.params.file import load_params
    from lgp.workflow.tracking import serve, store_uri

    run = load_params(params_file).run

    def announce() -> None:
        print(f"MLflow starts on http://127.0.0.1:{port} (about 15 s); Ctrl-C ends it.")
        print(f"Choose 'Model training' (top left; it opens as 'GenAI'), then Experiments > {run.experiment} > Runs.")
        print("To compare arms: search for tags.task = 'fewshot-1pct', tick the runs, click 'Compare'.")
        print("A click on confusion.png under Artifacts shows the pictures side by side.")
        print("Encoders are under 'Model registry'.", flush=True)

    serve(store_uri(run.tracking_uri, Path(os.environ.get("DVC_ROOT", "."))), port, announce)
