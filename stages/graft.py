"""Stage `graft`: contrastive learning on top of another arm's encoder (LGP, Jiang et al. 2023)."""

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile, Resume
from stages.paths import PREPARED, arm_folder, encoder_files, encoder_folder


def graft(
    params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, resume: Resume = False, debug: Debug = False
) -> None:
    """Continue contrastive learning from the encoder of `graft.start`, as `graft.policy` says."""
    from lgp.data.prepared import Prepared
    from lgp.graft import pretrain_graft
    from lgp.params import load_params
    from lgp.pretrain import Session, publish_arm
    from lgp.stage import StageSpec, stage

    arms = load_params(params_file).graft
    start, end = encoder_folder(arms.start), encoder_folder(arms.end)
    folder, reads = arm_folder("graft"), [PREPARED, *encoder_files(arms.start)]
    if end != start:
        reads += encoder_files(arms.end)
    spec = StageSpec(
        "graft", ["seed", "data", "model", "contrastive", "graft"], reads, [folder], "graft", "pretrain", trains=True
    )
    with stage(spec, params_file, fresh, resume) as run:
        data = Prepared(PREPARED)
        run.tag_upstream(start)
        result = pretrain_graft(Session(data, run.params, run.store, run.tracker), start, end)
        publish_arm(run, folder, result, data, starts=sorted({start, end}))
