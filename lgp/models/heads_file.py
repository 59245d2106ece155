"""The heads file of an arm, beside its encoder."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lgp.compute.intact import reading
from lgp.models.encoder_folder import save_tensors
from lgp.models.files import HEADS, check_beside
from lgp.params.arms import how_to_get

FIRST_FC = "first_fc"  # key in the metadata of heads.safetensors: the name of the projector's first layer


def save_heads(folder: Path, heads: dict[str, Tensor], first_fc: str | None) -> None:
    """Write the heads of an arm: decoder, projector, predictor.

    Args:
        folder: of the arm.
        heads: tensors by name, empty if the arm has no heads.
        first_fc: the name of the weight (hidden, width) of the projector's first layer, None without a projector.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in heads.items()}
    save_tensors(tensors, folder / HEADS, {FIRST_FC: first_fc} if first_fc else None)


def load_heads(folder: Path) -> dict[str, Tensor]:
    """Load the heads of an arm, an empty dict if it has none."""
    return load_beside(folder, HEADS) if (folder / HEADS).exists() else {}


def load_beside(folder: Path, name: str) -> dict[str, Tensor]:
    """Load a safetensors file beside the encoder of an arm. Raise `Damaged` if it is."""
    check_beside(folder, name)
    with reading(folder / name, how_to_get(folder.name), SafetensorError):
        return load_file(folder / name)


def load_first_fc(folder: Path) -> Tensor | None:
    """Load the first layer of an arm's contrastive projector, (hidden, width), None without a projector."""
    path = folder / HEADS
    if not path.exists():
        return None
    check_beside(folder, HEADS)
    with reading(path, how_to_get(folder.name), SafetensorError), safe_open(path, framework="pt") as heads:
        name = (heads.metadata() or {}).get(FIRST_FC)
        return heads.get_tensor(name) if name else None
