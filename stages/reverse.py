"""Stage `reverse`: the paper's control that grafts the other way round, MIM on top of CL."""

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile, Resume
from stages.paths import PREPARED, arm_folder, encoder_files, encoder_folder


def reverse(
    params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, resume: Resume = False, debug: Debug = False
) -> None:
    """Continue masked image modelling from the encoder of `cl`."""
    from lgp.controls import pretrain_reverse
    from lgp.data.prepared import Prepared
    from lgp.pretrain import Session, publish_arm
    from lgp.stage import StageSpec, stage

    folder, start, sections = arm_folder("reverse"), encoder_folder("cl"), ["seed", "data", "model", "mim", "reverse"]
    spec = StageSpec(
        "reverse", sections, [PREPARED, *encoder_files("cl")], [folder], "reverse", "pretrain", trains=True
    )
    with stage(spec, params_file, fresh, resume) as run:
        data = Prepared(PREPARED)
        run.tag_upstream(start)
        result = pretrain_reverse(Session(data, run.params, run.store, run.tracker), start)
        publish_arm(run, folder, result, data, starts=[start])
