"""Stage `labels`: labels, classes and few-label subsets of the prepared images."""

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import LABELS, METRICS, PREPARED


def labels(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Read the labels of the prepared images, and draw the few-label subsets."""
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
        metrics = write_labels(params.labels, params.data.source, Images(PREPARED), params.seed, run.out(LABELS))
        write_metrics(run, run.out(metrics_path), metrics)
        for line in describe(metrics, params.labels):
            print(f"labels: {line}", flush=True)
        if warning := small_validation(metrics["images/val"]):
            print(f"labels: warning: {warning}", flush=True)
