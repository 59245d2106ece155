"""Stage `graft`: contrastive learning on top of another arm's encoder (LGP, Jiang et al. 2023)."""

from stages.options import DEFAULT_PARAMS, Accept, Debug, Fresh, ParamsFile, Replay, Resume
from stages.paths import encoder_folder
from stages.pretraining import pretraining


def graft(
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    accept: Accept = False,
    replay: Replay = None,
    debug: Debug = False,
) -> None:
    """Continue contrastive learning from the encoder of `graft.start`, as `graft.policy` says."""
    from lgp.params.file import load_params

    arms = load_params(params_file).graft
    with pretraining("graft", params_file, fresh, resume, accept, replay, starts=[arms.start, arms.end]) as training:
        from lgp.pretrain.graft import pretrain_graft

        training.publish(pretrain_graft(training.session, encoder_folder(arms.start), encoder_folder(arms.end)))
