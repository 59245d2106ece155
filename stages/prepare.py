"""Stage `prepare`: decode, split and store the images."""

import os
import shutil
from pathlib import Path

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import HELD_OUT, METRICS, PREPARED

KEPT = Path(".lgp") / "prepared.npy"


def prepare(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Prepare the images of `data.source`."""
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    metrics_path = METRICS / "prepare.json"
    writes = [PREPARED, HELD_OUT, metrics_path]
    spec = StageSpec("prepare", SECTIONS["prepare"], [], writes, "data", "prepare")
    with stage(spec, params_file, fresh) as run:
        import numpy as np
        import pandas as pd

        from lgp.data.changes import changes, kept_images, read_kept
        from lgp.data.preparation import describe
        from lgp.data.preparation import prepare as prepare_data
        from lgp.data.stored import INDEX
        from lgp.workflow.metric_files import write_metrics

        work = run.store.folder / f"state-{run.provenance['digests']['code'][:16]}"
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        metrics, held_out = prepare_data(run.params.data, run.params.seed, run.out(PREPARED), HELD_OUT, work)
        held_out.write(run.out(HELD_OUT))
        write_metrics(run, run.out(metrics_path), metrics)
        run.tracker.tag("data_digest", metrics["digest"])
        kept = Path(os.environ.get("DVC_ROOT", ".")) / KEPT
        before = read_kept(kept)
        now = kept_images(pd.read_parquet(run.out(PREPARED) / INDEX, columns=["path", "content"]))
        for line in [*describe(metrics), *([] if before is None else [changes(before, now)])]:
            print(f"prepare: {line}", flush=True)
    kept.parent.mkdir(exist_ok=True)
    np.save(kept, now)
    shutil.rmtree(run.store.folder, ignore_errors=True)  # only now: a run that is killed before it goes on from there
