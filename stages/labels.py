"""Stage `labels`: labels and few-label subsets of the prepared images. Tool `labels add`: labels that arrive later."""

from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import LABELS, METRICS, PREPARED

labels_app = typer.Typer(invoke_without_command=True)


@labels_app.callback()
def labels(
    context: typer.Context, params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False
) -> None:
    """Read the labels of the prepared images, and draw the few-label subsets."""
    if context.invoked_subcommand:
        return
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    metrics_path = METRICS / "labels.json"
    spec = StageSpec("labels", SECTIONS["labels"], [PREPARED], [LABELS, metrics_path], "data", "labels")
    with stage(spec, params_file, fresh) as run:
        from lgp.data.labels import describe, write_labels
        from lgp.data.storage import Images
        from lgp.evaluate.validation import small_validation
        from lgp.workflow.metric_files import write_metrics

        params = run.params
        metrics = write_labels(params.labels, params.data, Images(PREPARED), params.seed, run.out(LABELS))
        write_metrics(run, run.out(metrics_path), metrics)
        for line in describe(metrics, params.labels):
            print(f"labels: {line}", flush=True)
        if metrics["classes"] and (warning := small_validation(metrics["images/val"])):
            print(f"labels: warning: {warning}", flush=True)


File = Annotated[Path, typer.Argument(help="CSV, TSV or JSON lines with columns of paths and labels.")]


@labels_app.command()
def add(file: File, params_file: ParamsFile = DEFAULT_PARAMS, debug: Debug = False) -> None:
    """Check a table of labels, add it to the project's own, and say what runs again."""
    from lgp.data.label_files import LABELS_FILE, added_labels, rerun, write_labels_file
    from lgp.data.sources.offers import Columns
    from lgp.data.sources.opening import open_sources
    from lgp.params.editing import write_values
    from lgp.params.file import load_params

    params = load_params(params_file)
    columns = Columns(**params.data.columns.model_dump())
    offers = open_sources(params.data.source, params.data.columns, params.data.labels)
    added = added_labels(offers, file, columns)
    own = params_file.parent / LABELS_FILE
    write_labels_file(own, added.labels)
    if LABELS_FILE not in params.data.labels:
        write_values(params_file, {"data.labels": [*params.data.labels, LABELS_FILE]})
    trained = [arm for arm in params.arms if arm not in ("pixels", "random")]
    for line in [*added.said(), f"{own} has them now; `lgp repro`: {rerun(trained, added.first)}"]:
        print(f"labels: {line}")
