"""Stage `prepare`: decode, split and store the images."""

import shutil

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import HELD_OUT, METRICS, PREPARED


def prepare(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Prepare the images of `data.source`."""
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    metrics_path = METRICS / "prepare.json"
    writes = [PREPARED, HELD_OUT, metrics_path]
    spec = StageSpec("prepare", SECTIONS["prepare"], [], writes, "data", "prepare")
    with stage(spec, params_file, fresh) as run:
        from lgp.data.preparation import describe
        from lgp.data.preparation import prepare as prepare_data
        from lgp.workflow.metric_files import write_metrics

        work = run.store.folder / f"state-{run.provenance['digests']['code'][:16]}"
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        metrics, held_out = prepare_data(run.params.data, run.params.seed, run.out(PREPARED), HELD_OUT, work)
        held_out.write(run.out(HELD_OUT))
        write_metrics(run, run.out(metrics_path), metrics)
        run.tracker.tag("data_digest", metrics["digest"])
        for line in describe(metrics):
            print(f"prepare: {line}", flush=True)
    shutil.rmtree(run.store.folder, ignore_errors=True)  # only now: a run that is killed before it goes on from there
