"""Stage `cl`: contrastive learning from scratch (MoCo v3, Chen et al. 2021), the baseline."""

from stages.options import DEFAULT_PARAMS, Accept, Debug, Fresh, ParamsFile, Replay, Resume
from stages.pretraining import pretraining


def cl(
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    accept: Accept = False,
    replay: Replay = None,
    debug: Debug = False,
) -> None:
    """Pre-train an encoder by contrastive learning from scratch, without labels."""
    with pretraining("cl", params_file, fresh, resume, accept, replay) as training:
        from lgp.pretrain.cl import pretrain_cl

        training.publish(pretrain_cl(training.session))
