"""Tool `export`: an arm's encoder as a checkpoint in MAE's layout."""

from pathlib import Path
from typing import Annotated

import typer

from stages.options import Arm
from stages.paths import arm_folder, encoder_folder

Target = Annotated[Path, typer.Argument(metavar="FILE", help="To write, e.g. graft.pth.")]


def export(arm: Arm, file: Target) -> None:
    """Write an arm's encoder (and MAE decoder) as a .pth in MAE's layout, for tools that expect it."""
    from lgp.models.encoder_folder import load_encoder, normalization_of
    from lgp.models.files import check_trained
    from lgp.models.heads_file import load_heads
    from lgp.models.interchange import export_checkpoint

    folder = encoder_folder(arm)
    tensors, normalization = load_encoder(folder).state_dict(), normalization_of(folder)
    warning = check_trained(folder)
    if warning:
        print(warning)
    count = export_checkpoint(tensors, load_heads(arm_folder(arm)), normalization, file)
    print(f"{file}: {count} tensors under `model`, as MAE names them; normalise images by {normalization}")
