"""Stage `joint`: the paper's control that sums the losses of MIM and CL on one encoder."""

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile, Resume
from stages.paths import PREPARED, arm_folder


def joint(
    params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, resume: Resume = False, debug: Debug = False
) -> None:
    """Pre-train an encoder by the summed losses of MIM and CL, without labels."""
    from lgp.controls import pretrain_joint
    from lgp.data.prepared import Prepared
    from lgp.pretrain import Session, publish_arm
    from lgp.stage import StageSpec, stage

    folder, sections = arm_folder("joint"), ["seed", "data", "model", "contrastive", "mim", "joint"]
    with stage(
        StageSpec("joint", sections, [PREPARED], [folder], "joint", "pretrain", trains=True), params_file, fresh, resume
    ) as run:
        data = Prepared(PREPARED)
        result = pretrain_joint(Session(data, run.params, run.store, run.tracker))
        publish_arm(run, folder, result, data)
