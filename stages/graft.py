"""Stage `graft`: contrastive learning on top of the MAE encoder (LGP, Jiang et al. 2023)."""

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import PREPARED, arm_folder, encoder_folder, metrics_file


def graft(params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False) -> None:
    """Continue contrastive learning from the encoder of `mim`, lower blocks slower."""
    from lgp.data.prepared import Prepared
    from lgp.graft import pretrain_graft
    from lgp.pretrain import Session, publish_arm
    from lgp.stage import StageSpec, stage

    folder, metrics, start = arm_folder("graft"), metrics_file("graft", "pretrain"), encoder_folder("mim")
    sections = ["seed", "data", "model", "contrastive", "graft"]
    reads = [PREPARED, start / "model.safetensors", start / "config.json"]
    spec = StageSpec("graft", sections, reads, [folder, metrics], "graft", "pretrain")
    with stage(spec, params_file, fresh) as run:
        data = Prepared(PREPARED)
        run.tag_upstream(start)
        result = pretrain_graft(Session(data, run.params, run.store, run.tracker), start)
        publish_arm(run, folder, metrics, result, data)
