"""Stage `import`: an encoder of another project becomes an arm."""

from pathlib import Path
from typing import Annotated

import typer

from lgp.errors import LgpError
from lgp.params.arms import BASELINES, TRAINED
from stages.options import DEFAULT_PARAMS, ArmName, Debug, ParamsFile
from stages.paths import PREPARED, arm_folder

CheckpointFile = Annotated[Path, typer.Argument(metavar="FILE", help=".pth, .pth.tar, .pt or .safetensors.")]
Mean = Annotated[str | None, typer.Option(metavar="M,M,M", help="Means of the images that it was trained on.")]
Std = Annotated[str | None, typer.Option(metavar="S,S,S", help="Their standard deviations, of pixels in [0, 1].")]
Partial = Annotated[bool, typer.Option("--partial", help="Take what fits, where tensors are missing or left over.")]


def import_checkpoint(
    file: CheckpointFile,
    arm: ArmName,
    params_file: ParamsFile = DEFAULT_PARAMS,
    partial: Partial = False,
    mean: Mean = None,
    std: Std = None,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint of MAE, MoCo v3, LGP, timm or lgp into an arm."""
    from lgp.data.normalization import parse_normalization
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    if arm in TRAINED:
        raise LgpError(f"the arm {arm} is trained by `lgp {arm}`: choose another name, and set graft.start to it")
    if arm in BASELINES:
        raise LgpError(f"the arm {arm} is a baseline: choose another name")
    if not file.is_file():
        raise LgpError(f"no file {file}: give a checkpoint (.pth, .pth.tar, .pt or .safetensors)")
    folder, given = arm_folder(arm), parse_normalization(mean, std)
    spec = StageSpec("import_checkpoint", SECTIONS["import_checkpoint"], [PREPARED, file], [folder], arm, "pretrain")
    with stage(spec, params_file) as run:
        from lgp.data.storage import Images
        from lgp.models.checkpoint_files import shown
        from lgp.models.interchange import few_faults
        from lgp.models.interchange import import_checkpoint as read
        from lgp.workflow.publishing import publish_imported

        imported = read(file, run.params.model, run.params.data, partial, given)
        for use in imported.uses:
            print(f"{shown(use.name):60} {shown(use.target or '–'):40} {use.how}")
        if imported.faults:
            print(f"warning: this encoder is not the file's: {few_faults(imported.faults)}")
        print(f"the checkpoint does not say the number of heads: model.heads gives {run.params.model.heads}")
        ours = Images(PREPARED).normalization
        print(f"its images are normalised by {imported.normalization}, from {imported.normalization_from}")
        if imported.normalization != ours:
            print(f"the prepared images have {ours}: to graft on it, set data.mean and data.std to the former")
        publish_imported(run, folder, imported)
    print(f"{file} ({imported.layout}) is now the arm {arm}: list it in `arms`, or set graft.start to it")
