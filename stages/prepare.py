"""Stage `prepare`: decode, split and store the images."""

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import METRICS, PREPARED


def prepare(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Prepare the images of `data.source`."""
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    metrics_path = METRICS / "prepare.json"
    spec = StageSpec("prepare", SECTIONS["prepare"], [], [PREPARED, metrics_path], "data", "prepare")
    with stage(spec, params_file, fresh) as run:
        from lgp.data.preparation import prepare as prepare_data
        from lgp.data.storage import PARTS
        from lgp.workflow.metric_files import write_metrics

        metrics = prepare_data(run.params.data, run.params.seed, run.out(PREPARED))
        write_metrics(run, run.out(metrics_path), metrics)
        run.tracker.tag("data_digest", metrics["digest"])
        counts = ", ".join(f"{metrics[f'images/{part}']} {part}" for part in PARTS)
        print(f"prepare: {counts} images", flush=True)
        for unreadable in metrics["unreadable"]:
            print(f"prepare: left out {unreadable['path']} ({unreadable['reason']})")
