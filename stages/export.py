"""Tool `export`: a model as a file or folder that is used without `lgp`. The suffix chooses the format."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lgp.errors import LgpError
from stages.options import is_arm_name
from stages.paths import METRICS, encoder_folder

Source = Annotated[
    str,
    typer.Argument(metavar="ARM_OR_FOLDER", help="mim, cl, graft, …, or the folder of an encoder or a classifier."),
]
Target = Annotated[Path, typer.Argument(metavar="FILE", help="To write: FILE.onnx, FILE.pt2, FILE.pth, or a folder.")]

FORMATS = ".onnx (ONNX), .pt2 (torch.export), .pth (MAE's layout), no suffix (a folder for the Hugging Face Hub)"


def export(source: Source, file: Target) -> None:
    """Write an encoder or a classifier for use elsewhere, in the format that the suffix of FILE chooses.

    .onnx: ONNX, for any number of images. .pt2: torch's exported program. .pth: MAE's layout, with an MAE decoder if
    the arm has one. No suffix: a folder for the Hugging Face Hub, which timm loads, with a model card.
    """
    if file.name.startswith(".") or file.suffix not in (".onnx", ".pt2", ".pth", ""):
        raise LgpError(f"{file}: {file.suffix or file.name} is no format of `lgp export`: choose {FORMATS}")
    folder = _model_folder(source)

    from lgp.models.exporting import export_mae, export_onnx, export_program, new_output
    from lgp.models.files import check_trained
    from lgp.workflow.model_card import export_hub_folder

    writers: dict[str, Callable[[Path, Path], str]] = {
        ".onnx": export_onnx,
        ".pt2": export_program,
        ".pth": export_mae,
        "": partial(export_hub_folder, metrics=METRICS),
    }
    warning = check_trained(folder)
    if warning:
        print(warning)
    with new_output(file) as written:
        said = writers[file.suffix](folder, written)
    print(f"{file}: {said}")


def _model_folder(source: str) -> Path:
    """Return the folder of a model. A name is an arm's, anything else is a path."""
    if is_arm_name(source):
        return encoder_folder(source)
    folder = Path(source)
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise LgpError(
            f"{source} is neither the name of an arm nor a folder with config.json and model.safetensors: give an arm, "
            "e.g. graft, or such a folder, e.g. models/graft/encoder"
        )
    return folder
