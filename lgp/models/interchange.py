"""Import of other projects' checkpoints, and export in MAE's layout. Every tensor of a file is accounted for."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.compute.randomness import seeded
from lgp.data.normalization import Normalization, foreign_normalization
from lgp.errors import LgpError
from lgp.models.checkpoint_files import fault_of, fault_of_count, object_beside, read_tensors, shown, unwrapped
from lgp.models.files import CONFIG
from lgp.models.vit import build_encoder, init_encoder_as_moco
from lgp.params.data import DataParams
from lgp.params.model import ModelParams

Tensors = Mapping[str, Tensor]

ENCODER, PROJECTOR = "encoder", "projector"
PROJECTOR_FIRST_FC = f"{PROJECTOR}.0.weight"
DECODER = re.compile(r"(decoder_|mask_token)")
# LGP's classifier for 10 % of labels has two layers; MAE's linear probe has a BatchNorm before its layer
CLASSIFIER = re.compile(r"(head|head_dist|fc|head\.0|head\.1)\.\w+$")
IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
PRETRAINED_CFG = "pretrained_cfg"  # timm's name for the record that holds an encoder's mean and std


@dataclass(frozen=True)
class Use:
    """The use of a tensor. `target` is its name in the encoder or among the heads, None if it is left out."""

    name: str
    target: str | None
    how: str


@dataclass(frozen=True)
class Layout:
    """How a project names its tensors.

    Attributes:
        name: name of the project, for messages.
        container: the key of the tensors in the file, None if the file is the container.
        encoder: prefix of the names of the encoder's tensors.
        projector: prefix of the names of the projector's tensors, None without a projector.
        left_out: returns the reason to leave out a tensor, None if the encoder should have it.
        normalization: of the project's images, None if its encoders differ in it.
    """

    name: str
    container: str | None
    encoder: str
    projector: str | None
    left_out: Callable[[str], str | None]
    normalization: Normalization | None


def _moco_left_out(name: str) -> str | None:
    if name.startswith("module.momentum_encoder."):
        return "momentum encoder"
    return "predictor" if name.startswith("module.predictor.") else None


def _plain_left_out(name: str) -> str | None:
    if DECODER.match(name):
        return "decoder"
    return "classifier" if CLASSIFIER.match(name) else None


LAYOUTS = (
    Layout(
        "MoCo v3 / LGP", "state_dict", "module.base_encoder.", "module.base_encoder.head.", _moco_left_out, IMAGENET
    ),
    Layout("LGP (linear probe)", "backbone_state_dict", "", None, _plain_left_out, IMAGENET),
    Layout("MAE", "model", "", None, _plain_left_out, IMAGENET),
    Layout("timm (in a training checkpoint)", "state_dict", "", None, _plain_left_out, None),
    Layout("timm or lgp", None, "", None, _plain_left_out, None),
)


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
    """

    layout: str
    encoder: VisionTransformer
    projector: dict[str, Tensor]
    uses: list[Use]
    normalization: Normalization
    normalization_from: str
    faults: list[str]

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
    """Read an encoder from a checkpoint of MAE, MoCo v3, LGP, timm or lgp.

    Position embeddings for another number of patches are interpolated, as in MAE's fine-tuning.

    Args:
        path: `.pth`, `.pth.tar`, `.pt` or `.safetensors`.
        model: dimensions that the encoder must have.
        data: size and channels of its images.
        partial: take the tensors that fit and leave out all others. Missing tensors keep their initial values.
        normalization: of the images that the encoder was trained on. None: that of the file, of a `config.json` beside
            it, or of its layout.

    Raises:
        LgpError: the file cannot be read without running code, has no known layout, or (unless `partial`) has tensors
            that are missing, misshapen or left over; the message names them. Or the normalization is not known, or of
            another number of channels.
    """
    content, beside = read_tensors(path), object_beside(path.with_name(CONFIG))
    layout, tensors = recognise(content, path)
    _check_heads(path, beside, model)
    with seeded(0, "import"):
        encoder = build_encoder(model, data)
        init_encoder_as_moco(encoder)
    wanted = encoder.state_dict()
    taken, projector, uses, faults = _take(tensors, layout, wanted, path)
    faults += [f"{name} is missing" for name in wanted if name not in taken]
    if faults and not partial:
        raise LgpError(
            f"{path} ({layout.name}) does not fill the encoder: {few_faults(faults)}. "
            f"{_dimensions(layout, tensors)}, the parameters say width {model.width}, depth {model.depth}, "
            f"patch {model.patch_size}, {data.channels} channels: set "
            "`model` and `data` to the file's, or add --partial to take what fits"
        )
    if not taken:
        raise LgpError(f"{path} ({layout.name}): not one tensor fits the encoder of the parameters")
    encoder.load_state_dict(wanted | taken, strict=True)
    known = (normalization, "the command") if normalization else _known_normalization(path, content, beside, layout)
    _check_channels(*known, data.channels)
    return Imported(layout.name, encoder, projector, uses, *known, faults)


def few_faults(faults: Sequence[str]) -> str:
    """Return the first faults as text, and how many more there are."""
    return "; ".join(faults[:4]) + (f"; and {len(faults) - 4} more" if len(faults) > 4 else "")


def _take(
    tensors: Tensors, layout: Layout, wanted: Tensors, path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Use], list[str]]:
    """Return what is taken for the encoder, the projector, the use of each tensor, and the faults.

    Args:
        tensors: of the checkpoint.
        layout: of the checkpoint.
        wanted: the encoder's own tensors, in their shapes.
        path: of the checkpoint, for messages.

    Raises:
        LgpError: a tensor of the encoder or the projector is no weight.
    """
    taken: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    uses, faults = [], []
    for name, tensor in tensors.items():
        target = name.removeprefix(layout.encoder) if name.startswith(layout.encoder) else ""
        reason = layout.left_out(name)
        if layout.projector and name.startswith(layout.projector):
            head = f"{PROJECTOR}.{name.removeprefix(layout.projector)}"
            projector[head] = _checked_head(head, tensor, wanted, f"{path}: {shown(name)}")
            uses.append(Use(name, head, PROJECTOR))
        elif target in wanted:
            _check_weight(tensor, f"{path}: {name}")
            fitted, how = _fitted(target, tensor, wanted[target])
            if fitted is None:
                faults.append(f"{name} is {how}")
                uses.append(Use(name, None, how))
            else:
                if fitted is not tensor:  # interpolated
                    _check_weight(fitted, f"{path}: {name}, {how},")
                taken[target] = fitted.to(wanted[target].dtype)
                uses.append(Use(name, target, how))
        else:
            uses.append(Use(name, None, reason or "no place in the encoder"))
            if reason is None:
                faults.append(f"{shown(name)} has no place in the encoder")
    return taken, projector, uses, faults


def _check_heads(path: Path, beside: Mapping[str, Any], model: ModelParams) -> None:
    """Check the number of attention heads against a configuration beside the file. No tensor shows this number."""
    args = beside.get("model_args")
    heads = args.get("num_heads", model.heads) if isinstance(args, Mapping) else model.heads
    if heads != model.heads:
        raise LgpError(
            f"{path.with_name(CONFIG)} says {shown(heads)} heads, model.heads is {model.heads}: set it to "
            f"{shown(heads)}, or mend the file"
        )


def _check_channels(normalization: Normalization, source: str, channels: int) -> None:
    if len(normalization.mean) != channels:
        raise LgpError(
            f"{normalization} (from {source}) is of {len(normalization.mean)} channels, data.channels is {channels}: "
            "give the statistics that the encoder was trained with, one value a channel, with --mean and --std"
        )


def _known_normalization(
    path: Path, content: Any, beside: Mapping[str, Any], layout: Layout
) -> tuple[Normalization, str]:
    """Return the normalization of the images that an encoder was trained on, and where it is from.

    Args:
        path: of the checkpoint.
        content: of the checkpoint. `lgp export` puts the normalization there.
        beside: the configuration beside it. Old ones of timm have no `pretrained_cfg` of their own.
        layout: of the checkpoint.

    Raises:
        LgpError: none of these says it.
    """
    records = {path: content.get(PRETRAINED_CFG), path.with_name(CONFIG): beside.get(PRETRAINED_CFG, beside)}
    for source, record in records.items():
        if isinstance(record, Mapping) and None not in (record.get("mean"), record.get("std")):
            return foreign_normalization(record, source), str(source)
    if layout.normalization is not None:
        return layout.normalization, f"the code of {layout.name}"
    raise LgpError(
        f"neither {path} ({layout.name}) nor a {CONFIG} beside it says by which mean and standard deviation its images "
        "were normalised: give one value a channel, e.g. --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 "
        "(many ViTs of timm have 0.5,0.5,0.5 for both)"
    )


def recognise(content: Any, path: Path) -> tuple[Layout, Tensors]:
    """Return a file's layout, by its keys, and its tensors. Raise `LgpError` for an unknown layout."""
    for layout in LAYOUTS:
        inner = content.get(layout.container) if isinstance(content, dict) and layout.container else content
        for tensors in (inner, unwrapped(inner)) if isinstance(inner, dict) else ():
            if f"{layout.encoder}blocks.0.norm1.weight" in tensors:
                return layout, {n: t for n, t in tensors.items() if isinstance(t, Tensor) and isinstance(n, str)}
    raise LgpError(
        f"{path} has no known layout (its keys begin with {_first_keys(content)}): expected a ViT of "
        f"{', '.join(layout.name for layout in LAYOUTS)}"
    )


def _first_keys(content: Any) -> str:
    """Return the first keys of a file, and of the containers in it, as text."""
    if not isinstance(content, dict):
        return type(content).__name__
    keys = [
        f"{shown(key)} ({', '.join(map(shown, list(value)[:2]))}, …)"
        if isinstance(value, dict) and value
        else shown(key)
        for key, value in list(content.items())[:5]
    ]
    return ", ".join(keys) or "none"


def _check_weight(tensor: Tensor, which: str) -> None:
    if fault := fault_of(tensor):
        raise LgpError(f"{which} {fault}: the file is damaged, or no checkpoint of plain weights")


def _checked_head(head: str, tensor: Tensor, wanted: Tensors, which: str) -> Tensor:
    """Return a tensor of the projector, a weight in single precision or a count, in memory of its own.

    Raises:
        LgpError: it is neither, or the first layer, which few labels use, does not fit the encoder.
    """
    if head.endswith("num_batches_tracked"):
        if fault := fault_of_count(tensor):
            raise LgpError(f"{which} {fault}: the file is damaged")
        return tensor.clone()
    _check_weight(tensor, which)
    width = len(wanted["norm.weight"])
    if head == PROJECTOR_FIRST_FC and (tensor.ndim != 2 or tensor.shape[1] != width or not len(tensor)):
        raise LgpError(f"{which} is {tuple(tensor.shape)} where (N, {width}) is needed: the file is damaged")
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _fitted(target: str, tensor: Tensor, wanted: Tensor) -> tuple[Tensor | None, str]:
    """Return the tensor in the encoder's shape, None if it does not fit, and how it is used."""
    if tensor.shape == wanted.shape:
        return tensor, ENCODER
    same_width = tensor.ndim == 3 and tensor.shape[::2] == wanted.shape[::2]
    if target == "pos_embed" and same_width and _is_square(tensor.shape[1] - 1):
        old, new = round((tensor.shape[1] - 1) ** 0.5), round((wanted.shape[1] - 1) ** 0.5)
        # bicubic and not antialiased, as MAE's and LGP's code
        resampled: Tensor = resample_abs_pos_embed(tensor.float(), [new, new], num_prefix_tokens=1, antialias=False)
        return resampled, f"interpolated from {old}×{old} to {new}×{new} patches"
    return None, f"{tuple(tensor.shape)} where {tuple(wanted.shape)} is needed"


def _is_square(n: int) -> bool:
    return n > 0 and round(n**0.5) ** 2 == n


def _dimensions(layout: Layout, tensors: Tensors) -> str:
    """Return the dimensions of the ViT in a file, from the shapes of its tensors, as text."""
    blocks = re.compile(rf"{re.escape(layout.encoder)}blocks\.(\d{{1,4}})\.")
    depth = 1 + max(int(found[1]) for name in tensors if (found := blocks.match(name)))
    patch = tensors.get(f"{layout.encoder}patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        return f"The file holds a ViT of depth {depth}"
    return (
        f"The file holds a ViT of width {len(patch)}, depth {depth}, patch {patch.shape[2]}, {patch.shape[1]} channels"
    )


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
