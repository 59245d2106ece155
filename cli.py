"""The `lgp` command. It registers the stages of the pipeline, and the tools around it."""

from collections.abc import Callable
from typing import Annotated

import typer

from lgp.compute.interruption import stopped_by_signals
from stages.audit import audit
from stages.baseline import baseline
from stages.bench import bench
from stages.cl import cl
from stages.clean import clean
from stages.compare import compare
from stages.conflict import conflict
from stages.data import data_app
from stages.embed import embed
from stages.export import export
from stages.fewshot import fewshot
from stages.finetune import finetune
from stages.graft import graft
from stages.import_checkpoint import import_checkpoint
from stages.init import init
from stages.joint import joint
from stages.labels import labels_app
from stages.linear import linear
from stages.mim import mim
from stages.options import OneLineErrors, print_version
from stages.plan import plan
from stages.predict import predict
from stages.prepare import prepare
from stages.preset import preset_app
from stages.promote import promote
from stages.propagate import propagate
from stages.report import report
from stages.repro import repro
from stages.results import results
from stages.reverse import reverse
from stages.select import select
from stages.selected import selected
from stages.semi import semi
from stages.similar import similar
from stages.status import status
from stages.suggest import suggest
from stages.tracking import tracking_app
from stages.ui import ui

TOOLS = "Tools"

app = typer.Typer(cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
PANELS: dict[str, list[Callable[..., None]]] = {
    "Pipeline": [prepare, mim, cl, graft, baseline, linear, fewshot, propagate, selected, finetune, semi, report],
    "Controls of the paper": [joint, reverse],
    TOOLS: [
        init,
        repro,
        status,
        clean,
        results,
        predict,
        select,
        audit,
        embed,
        similar,
        promote,
        ui,
        compare,
        plan,
        conflict,
        suggest,
        export,
        bench,
    ],
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(labels_app, name="labels", rich_help_panel="Pipeline")
app.command("import", rich_help_panel=TOOLS)(import_checkpoint)
app.add_typer(preset_app, name="preset", rich_help_panel=TOOLS)
app.add_typer(tracking_app, name="tracking", rich_help_panel=TOOLS)
app.add_typer(data_app, name="data", rich_help_panel=TOOLS)

Version = Annotated[
    bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=print_version)
]


@app.callback()
def main(version: Version = False) -> None:
    """Layer Grafted Pre-training: from a folder of images to a label-efficient encoder."""


if __name__ == "__main__":
    with stopped_by_signals():
        app(prog_name="lgp")
