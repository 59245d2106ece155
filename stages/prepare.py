"""Stage `prepare`: decode, split and store the images, draw the few-label subsets."""

from pathlib import Path

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import METRICS, PREPARED


def prepare(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Prepare the images of `data.source`."""
    from lgp.data.prepare import prepare as prepare_data
    from lgp.stage import StageSpec, stage

    metrics_path = METRICS / "prepare.json"
    reads: list[Path] = []
    spec = StageSpec("prepare", ["seed", "data"], reads, [PREPARED, metrics_path], arm="data", task="prepare")
    with stage(spec, params_file, fresh) as run:
        metrics = prepare_data(run.params.data, run.params.seed, run.out(PREPARED))
        run.write_metrics(run.out(metrics_path), metrics)
        run.tracker.tag("data_digest", metrics["digest"])
        counts = ", ".join(f"{metrics[f'images/{s}']} {s}" for s in ("train", "unlabeled", "val", "test"))
        print(f"prepare: {counts} images in {metrics['classes']} classes", flush=True)
        if metrics["leaks"]:
            fate = {"report": "which stay", "drop_test": "dropped from test", "drop_train": "dropped from the rest"}
            print(
                f"prepare: {metrics['leaks/exact']} test images also stand elsewhere, {metrics['leaks/near']} nearly, "
                f"{fate[run.params.data.leaks]}: listed in {metrics_path}"
            )
        for unreadable in metrics["unreadable"]:
            print(f"prepare: left out {unreadable['path']} ({unreadable['reason']})")
