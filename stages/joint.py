"""Stage `joint`: the paper's control that sums the losses of MIM and CL on one encoder."""

from stages.options import DEFAULT_PARAMS, Accept, Debug, Fresh, ParamsFile, Replay, Resume
from stages.pretraining import pretraining


def joint(
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    accept: Accept = False,
    replay: Replay = None,
    debug: Debug = False,
) -> None:
    """Pre-train an encoder by the summed losses of MIM and CL, without labels."""
    with pretraining("joint", params_file, fresh, resume, accept, replay) as training:
        from lgp.pretrain.controls import pretrain_joint

        training.publish(pretrain_joint(training.session))
