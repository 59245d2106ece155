"""Stage `import`: an encoder of another project becomes an arm."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lgp.errors import LgpError
from lgp.params.arms import BASELINES, TRAINED
from stages.options import DEFAULT_PARAMS, ArmName, Debug, ParamsFile
from stages.paths import PREPARED, arm_folder

if TYPE_CHECKING:
    from lgp.models.interchange import Use

CheckpointFile = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help=".pth, .pth.tar, .pt or .safetensors, a folder with one, or what timm fetches: timm:NAME, hf-hub:NAME.",
    ),
]
Write = Annotated[bool, typer.Option("--write", help="First set `model` in the parameter file to the file's encoder.")]
Mean = Annotated[str | None, typer.Option(metavar="M,M,M", help="Means of the images that it was trained on.")]
Std = Annotated[str | None, typer.Option(metavar="S,S,S", help="Their standard deviations, of pixels in [0, 1].")]
Partial = Annotated[bool, typer.Option("--partial", help="Take what fits, where tensors are missing or left over.")]


def import_checkpoint(
    file: CheckpointFile,
    arm: ArmName,
    params_file: ParamsFile = DEFAULT_PARAMS,
    write: Write = False,
    partial: Partial = False,
    mean: Mean = None,
    std: Std = None,
    debug: Debug = False,
) -> None:
    """Turn a checkpoint of MAE, MoCo v3, LGP, timm, lgp, DINOv2, CLIP or Hugging Face's ViT into an arm."""
    from lgp.data.normalization import parse_normalization
    from lgp.models.files import is_remote, weights_at
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    if arm in TRAINED:
        raise LgpError(f"the arm {arm} is trained by `lgp {arm}`: choose another name, and set graft.start to it")
    if arm in BASELINES:
        raise LgpError(f"the arm {arm} is a baseline: choose another name")
    folder, given = arm_folder(arm), parse_normalization(mean, std)
    files = [] if is_remote(file) else [weights_at(file)]
    spec = StageSpec("import_checkpoint", SECTIONS["import_checkpoint"], [PREPARED, *files], [folder], arm, "pretrain")
    with _model_of(file, params_file) if write else nullcontext(), stage(spec, params_file) as run:
        from lgp.data.storage import Images
        from lgp.models.checkpoint_files import shown
        from lgp.models.interchange import few_faults
        from lgp.models.interchange import import_checkpoint as read
        from lgp.workflow.publishing import publish_imported

        imported = read(file, run.params.model, run.params.data, partial, given)
        for (name, target, how), count in Counter(map(_of_any_number, imported.uses)).items():
            print(f"{shown(name):60} {shown(target):40} {how}{f' ({count} tensors)' if count > 1 else ''}")
        if imported.faults:
            print(f"warning: this encoder is not the file's: {few_faults(imported.faults)}")
        if not imported.heads_from:
            print(f"the checkpoint does not say the number of heads: model.heads gives {run.params.model.heads}")
        ours = Images(PREPARED).normalization
        print(f"its images are normalised by {imported.normalization}, from {imported.normalization_from}")
        if imported.normalization != ours:
            print(f"the prepared images have {ours}: to graft on it, set data.mean and data.std to the former")
        publish_imported(run, folder, imported)
    print(f"{file} ({imported.layout}) is now the arm {arm}: list it in `arms`, or set graft.start to it")


def _of_any_number(use: "Use") -> tuple[str, str, str]:
    """Return name, target and use of a tensor, a star for each number: one line tells the tensors of all blocks."""
    name, target = (re.sub(r"\.\d+(?=\.)", ".*", of) for of in (use.name, use.target or "–"))
    return name, target, use.how


@contextmanager
def _model_of(file: Path, params_file: Path) -> Iterator[None]:
    """Set the section `model` of the parameter file to what a checkpoint holds. An error puts the file back."""
    from lgp.models.layouts import model_of
    from lgp.params.editing import write_values
    from lgp.params.file import load_params

    model = model_of(file)
    if load_params(params_file).model.timm is None and model["timm"] is None:
        del model["timm"]
    before = params_file.read_bytes()
    write_values(params_file, {f"model.{key}": value for key, value in model.items()})
    try:
        yield
    except BaseException:
        params_file.write_bytes(before)
        raise
    print(f"{params_file}: model is now {', '.join(f'{key} {value}' for key, value in model.items())}")
