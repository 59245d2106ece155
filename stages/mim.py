"""Stage `mim`: masked image modelling of the encoder (MAE, He et al. 2022)."""

from stages.options import DEFAULT_PARAMS, Accept, Debug, Fresh, ParamsFile, Replay, Resume
from stages.pretraining import pretraining


def mim(
    params_file: ParamsFile = DEFAULT_PARAMS,
    fresh: Fresh = False,
    resume: Resume = False,
    accept: Accept = False,
    replay: Replay = None,
    debug: Debug = False,
) -> None:
    """Pre-train an encoder by masked image modelling, without labels."""
    with pretraining("mim", params_file, fresh, resume, accept, replay) as training:
        from lgp.models.files import RECONSTRUCTIONS
        from lgp.pretrain.mim import pretrain_mim, write_reconstructions

        run, session = training.run, training.session
        result = pretrain_mim(session)
        pictures = write_reconstructions(
            run.out(training.folder) / RECONSTRUCTIONS, result, session.data, run.params.seed
        )
        run.tracker.log_reconstructions(pictures)
        training.publish(result)
