"""Stage `cl`: contrastive learning from scratch (MoCo v3, Chen et al. 2021), the baseline."""

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile, Resume
from stages.paths import PREPARED, arm_folder


def cl(
    params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, resume: Resume = False, debug: Debug = False
) -> None:
    """Pre-train an encoder by contrastive learning from scratch, without labels."""
    from lgp.cl import pretrain_cl
    from lgp.data.prepared import Prepared
    from lgp.pretrain import Session, publish_arm
    from lgp.stage import StageSpec, stage

    folder = arm_folder("cl")
    sections = ["seed", "data", "model", "contrastive", "cl"]
    spec = StageSpec("cl", sections, [PREPARED], [folder], "cl", "pretrain", trains=True)
    with stage(spec, params_file, fresh, resume) as run:
        data = Prepared(PREPARED)
        result = pretrain_cl(Session(data, run.params, run.store, run.tracker))
        publish_arm(run, folder, result, data)
