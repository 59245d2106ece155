"""Stage `mim`: masked image modelling of the encoder (MAE, He et al. 2022)."""

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile, Resume
from stages.paths import PREPARED, arm_folder


def mim(
    params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, resume: Resume = False, debug: Debug = False
) -> None:
    """Pre-train an encoder by masked image modelling, without labels."""
    from lgp.arms import RECONSTRUCTIONS
    from lgp.data.prepared import Prepared
    from lgp.mim import pretrain_mim, write_reconstructions
    from lgp.pretrain import Session, publish_arm
    from lgp.stage import StageSpec, stage

    folder = arm_folder("mim")
    spec = StageSpec("mim", ["seed", "data", "model", "mim"], [PREPARED], [folder], "mim", "pretrain", trains=True)
    with stage(spec, params_file, fresh, resume) as run:
        data = Prepared(PREPARED)
        result = pretrain_mim(Session(data, run.params, run.store, run.tracker))
        pictures = write_reconstructions(run.out(folder) / RECONSTRUCTIONS, result, data, run.params.seed)
        publish_arm(run, folder, result, data)
        run.tracker.log_reconstructions(pictures)
