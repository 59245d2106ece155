"""Import of other projects' checkpoints, and export in MAE's layout. Every tensor of a file is accounted for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.compute.randomness import seeded
from lgp.data.normalization import Normalization
from lgp.errors import LgpError
from lgp.models.checkpoint_files import fault_of, fault_of_count, shown
from lgp.models.files import CONFIG
from lgp.models.layouts import DECODER, PRETRAINED_CFG, VITAL, Checkpoint, is_square
from lgp.models.vit import build_encoder, init_encoder_as_moco
from lgp.params.data import DataParams
from lgp.params.model import ModelParams

Tensors = Mapping[str, Tensor]

ENCODER, PROJECTOR = "encoder", "projector"
PROJECTOR_FIRST_FC = f"{PROJECTOR}.0.weight"


@dataclass(frozen=True)
class Use:
    """The use of a tensor. `target` is its name in the encoder or among the heads, None if it is left out."""

    name: str
    target: str | None
    how: str


@dataclass(frozen=True)
class Imported:
    """An encoder from a file.

    Attributes:
        layout: name of the project.
        encoder: the encoder.
        projector: its projector, empty if the file has none.
        uses: the use of each tensor of the file.
        normalization: of the images that the encoder was trained on.
        normalization_from: where that is from, as text.
        faults: what is missing, misshapen or left over, empty unless the import was partial.
        heads_from: what tells the number of attention heads; empty if nothing does.
    """

    layout: str
    encoder: VisionTransformer
    projector: dict[str, Tensor]
    uses: list[Use]
    normalization: Normalization
    normalization_from: str
    faults: list[str]
    heads_from: str

    @property
    def first_fc(self) -> str | None:
        """The name of the weight of the projector's first layer, None without a projector."""
        return PROJECTOR_FIRST_FC if PROJECTOR_FIRST_FC in self.projector else None


def import_checkpoint(
    path: Path,
    model: ModelParams,
    data: DataParams,
    partial: bool = False,
    normalization: Normalization | None = None,
) -> Imported:
    """Read an encoder from a checkpoint of MAE, MoCo v3, LGP, timm, lgp, DINOv2, CLIP or Hugging Face's ViT.

    Position embeddings for another number of patches are interpolated, as in MAE's fine-tuning.

    Args:
        path: `.pth`, `.pth.tar`, `.pt` or `.safetensors`, a folder with one, or `timm:NAME` or `hf-hub:NAME`, which are
            fetched.
        model: dimensions that the encoder must have.
        data: size and channels of its images.
        partial: take the tensors that fit and leave out all others. Missing tensors keep their initial values.
        normalization: of the images that the encoder was trained on. None: that of the file, of a `config.json` beside
            it, or of its layout.

    Raises:
        LgpError: the file cannot be read without running code, has no known layout, or (unless `partial`) has tensors
            that are missing, misshapen or left over; the message names them. Or it has tokens, positions or scales
            that the encoder has no place for. Or the normalization is not known, or of another number of channels.
    """
    checkpoint = Checkpoint.read(path)
    path, layout = checkpoint.path, checkpoint.layout.name
    heads_from = _check_heads(checkpoint, model)
    with seeded(0, "import"):
        encoder = build_encoder(model, data)
        init_encoder_as_moco(encoder)
    wanted = encoder.state_dict()
    taken, projector, uses, faults = _take(checkpoint, encoder)
    faults += [f"{name} is missing" for name in wanted if name not in taken]
    computed = set() if model.timm else {"pos_embed is missing"}  # it keeps the paper's
    vital = [fault for fault in faults if VITAL.match(fault) and fault not in computed]
    if vital or (faults and not partial):
        partly = "--partial needs all tokens, positions and scales" if partial else "add --partial to take what fits"
        raise LgpError(
            f"{path} ({layout}) does not fill the encoder: {few_faults(vital if partial else faults)}. "
            f"{checkpoint.dimensions()}, the parameters say {_said(model)}, {data.channels} channels: set `model` and "
            f"`data` to the file's (--write sets `model`); {partly}"
        )
    if not taken:
        raise LgpError(f"{path} ({layout}): not one tensor fits the encoder of the parameters")
    encoder.load_state_dict(wanted | taken, strict=True)
    known = (normalization, "the command") if normalization else checkpoint.normalization()
    _check_channels(*known, data.channels)
    return Imported(layout, encoder, projector, uses, *known, faults, heads_from)


def _said(model: ModelParams) -> str:
    name = f"{model.timm}, " if model.timm else ""
    return f"{name}width {model.width}, depth {model.depth}, patch {model.patch_size}"


def few_faults(faults: Sequence[str]) -> str:
    """Return the first faults as text, and how many more there are."""
    return "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")


def _take(
    checkpoint: Checkpoint, encoder: VisionTransformer
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Use], list[str]]:
    """Return what is taken for the encoder, the projector, the use of each tensor, and the faults.

    Raises:
        LgpError: a tensor of the encoder or the projector is no weight.
    """
    layout, renamed, path, wanted = checkpoint.layout, checkpoint.renamed, checkpoint.path, encoder.state_dict()
    taken: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    uses, faults = [], []
    for name, tensor in checkpoint.tensors.items():
        target = name.removeprefix(layout.encoder) if name.startswith(layout.encoder) else ""
        reason, source = layout.left_out(name), renamed.sources.get(name, name)
        if layout.projector and name.startswith(layout.projector):
            head = f"{PROJECTOR}.{name.removeprefix(layout.projector)}"
            projector[head] = _checked_head(head, tensor, encoder.embed_dim, f"{path}: {shown(name)}")
            uses.append(Use(name, head, PROJECTOR))
        elif target in wanted:
            _check_weight(tensor, f"{path}: {source}")
            fitted, how = _fitted(target, tensor, wanted[target], encoder)
            if fitted is None:
                faults.append(f"{name} is {how}")
                uses.append(Use(source, None, how))
            else:
                if fitted is not tensor:  # interpolated
                    _check_weight(fitted, f"{path}: {source}, {how},")
                taken[target] = fitted.to(wanted[target].dtype)
                uses.append(Use(source, target, how))
        else:
            uses.append(Use(source, None, reason or "no place in the encoder"))
            if reason is None:
                faults.append(f"{shown(name)} has no place in the encoder")
    uses += [Use(name, None, reason) for name, reason in renamed.left_out.items()]
    return taken, projector, uses, faults


def _check_heads(checkpoint: Checkpoint, model: ModelParams) -> str:
    """Check the number of attention heads, which no tensor shows. Return what tells it; empty if nothing does.

    A configuration beside the file may also tell timm's name of the architecture, which decides more than tensors show.
    """
    heads, source = checkpoint.heads()
    named = checkpoint.architecture()
    if model.timm and named not in (None, model.timm):
        raise LgpError(f"{checkpoint.path} is a {shown(named)}, model.timm is {model.timm}: set it to the former")
    if heads is not None and str(heads) != str(model.heads):
        ours = f"{model.timm} has {model.heads}" if model.timm else f"model.heads is {model.heads}"
        raise LgpError(
            f"{source} says {shown(heads)} heads, {ours}: set `model` to the file's encoder, as --write does. If "
            f'that is wrong, write {{"model_args": {{"num_heads": {model.heads}}}}} into a {CONFIG} beside the file'
        )
    return model.timm or (source if heads is not None else "")


def _check_channels(normalization: Normalization, source: str, channels: int) -> None:
    if len(normalization.mean) != channels:
        raise LgpError(
            f"{normalization} (from {source}) is of {len(normalization.mean)} channels, data.channels is {channels}: "
            "give the statistics that the encoder was trained with, one value a channel, with --mean and --std"
        )


def _check_weight(tensor: Tensor, which: str) -> None:
    if fault := fault_of(tensor):
        raise LgpError(f"{which} {fault}: the file is damaged, or no checkpoint of plain weights")


def _checked_head(head: str, tensor: Tensor, width: int, which: str) -> Tensor:
    """Return a tensor of the projector, a weight in single precision or a count, in memory of its own.

    Raises:
        LgpError: it is neither, or the first layer, which few labels use, does not fit the encoder.
    """
    if head.endswith("num_batches_tracked"):
        if fault := fault_of_count(tensor):
            raise LgpError(f"{which} {fault}: the file is damaged")
        return tensor.clone()
    _check_weight(tensor, which)
    if head == PROJECTOR_FIRST_FC and (tensor.ndim != 2 or tensor.shape[1] != width or not len(tensor)):
        raise LgpError(f"{which} is {tuple(tensor.shape)} where (N, {width}) is needed: the file is damaged")
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _fitted(target: str, tensor: Tensor, wanted: Tensor, encoder: VisionTransformer) -> tuple[Tensor | None, str]:
    """Return the tensor in the encoder's shape, None if it does not fit, and how it is used."""
    if tensor.shape == wanted.shape:
        return tensor, ENCODER
    same_width = tensor.ndim == 3 and tensor.shape[::2] == wanted.shape[::2]
    prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    if target == "pos_embed" and same_width and is_square(tensor.shape[1] - prefix):
        old, new = (round((tokens - prefix) ** 0.5) for tokens in (tensor.shape[1], wanted.shape[1]))
        # positions that learn are timm's, and antialiased as there; the paper's are not, as in MAE's and LGP's code
        antialias = encoder.pos_embed.requires_grad
        resampled: Tensor = resample_abs_pos_embed(
            tensor.float(), [new, new], num_prefix_tokens=prefix, antialias=antialias
        )
        return resampled, f"interpolated from {old}×{old} to {new}×{new} patches"
    return None, f"{tuple(tensor.shape)} where {tuple(wanted.shape)} is needed"


def export_checkpoint(encoder: Tensors, heads: Tensors, normalization: Normalization, path: Path) -> int:
    """Write a checkpoint in MAE's layout, `{"model": tensors}`. Return the number of tensors.

    The normalization is written beside the tensors, as `pretrained_cfg`: MAE's readers pass over it, and
    `import_checkpoint` takes it in place of ImageNet's.

    Args:
        encoder: tensors of an encoder folder; timm's names are MAE's.
        heads: tensors of an arm's heads. An MAE decoder among them is written. All others are left out.
        normalization: of the images that the encoder was trained on.
        path: of the file.
    """
    decoder = {name.removeprefix("mae."): tensor for name, tensor in heads.items()}
    tensors = dict(encoder) | {name: tensor for name, tensor in decoder.items() if DECODER.match(name)}
    cfg = {"mean": list(normalization.mean), "std": list(normalization.std)}
    torch.save({"model": tensors, PRETRAINED_CFG: cfg}, path)
    return len(tensors)
