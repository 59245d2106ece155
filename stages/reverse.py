"""Stage `reverse`: the paper's control that reverses the graft, MIM on top of CL."""

from stages.options import DEFAULT_PARAMS, Accept, Debug, Fresh, ParamsFile, Replay, Resume
from stages.paths import encoder_folder
from stages.pretraining import pretraining


def reverse(
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    accept: Accept = False,
    replay: Replay = None,
    debug: Debug = False,
) -> None:
    """Continue masked image modelling from the encoder of `cl`."""
    with pretraining("reverse", params_file, fresh, resume, accept, replay, starts=["cl"]) as training:
        from lgp.pretrain.controls import pretrain_reverse

        training.publish(pretrain_reverse(training.session, encoder_folder("cl")))
