"""Checkpoints whose tensors have other names than timm's: DINOv2's, CLIP's, and Hugging Face's ViT and ViTMAE."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from lgp.errors import LgpError, one_line
from lgp.models.checkpoint_files import fault_of, shown

Tensors = Mapping[str, Tensor]
POSITIONS = ("pos_embed", "visual.positional_embedding")
PATCHES = ("patch_embed.proj.weight", "visual.conv1.weight")
ROTARY = re.compile(r"(^|\.)rope")
QKV = ("query", "key", "value")
# Hugging Face's name → timm's, in this order; each block's queries, keys and values are one tensor of timm
HUGGING_FACE = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    (".attention.output.dense.", ".attn.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    ("layernorm.", "norm."),
)


@dataclass
class Renamed:
    """The tensors of a checkpoint under timm's names.

    Attributes:
        tensors: timm's name → tensor.
        sources: timm's name → its names in the file.
        left_out: name in the file → the reason to leave it out.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


Rename = Callable[[Tensors], Renamed]


def by_timm(tensors: Tensors) -> Renamed:
    """Rename the tensors of DINOv2 or of a CLIP image tower, as timm does. The text tower is left out.

    Raises:
        LgpError: a tensor is no weight, or timm cannot convert them.
    """
    if rotary := next((name for name in tensors if ROTARY.search(name)), None):
        raise LgpError(f"it has rotary positions ({shown(rotary)}), as DINOv3 and EVA-02: that is no plain ViT")
    is_clip = "visual.class_embedding" in tensors
    ours = {name: tensor for name, tensor in tensors.items() if not is_clip or name.startswith("visual.")}
    _check(ours)
    like_it = _of_the_files_size(ours)
    try:
        converted = checkpoint_filter_fn(dict(ours), like_it)
    except Exception as e:  # noqa: BLE001 - timm raises any exception for tensors of other shapes
        raise LgpError(f"timm cannot give its tensors timm's names: {one_line(e)[:200]}") from None
    # most are the same memory under another name
    at = {(tensor.data_ptr(), tensor.numel()): name for name, tensor in ours.items()}
    found = {name: name if name in ours else at.get((t.data_ptr(), t.numel())) for name, t in converted.items()}
    sources = {name: source for name, source in found.items() if source is not None}
    converted = {name: converted[name] for name in sources}  # without a bias of zeros for CLIP's projection
    text = {name: "text tower" for name in tensors if name not in ours}
    unused = {name: "not used by timm" for name in ours if name not in {*sources.values(), *converted}}
    return Renamed(converted, sources, text | unused)


def _of_the_files_size(tensors: Tensors) -> VisionTransformer:
    """Build a ViT with as many patches as the file has positions, so that timm interpolates nothing."""
    positions = next((tensors[name] for name in POSITIONS if name in tensors), None)
    patches = next((tensors[name] for name in PATCHES if name in tensors), None)
    if positions is None or patches is None:
        raise LgpError(f"it lacks positions ({' or '.join(POSITIONS)}) or patches ({' or '.join(PATCHES)})")
    if patches.ndim != 4 or patches.shape[2] != patches.shape[3] or not patches.numel() or positions.ndim < 2:
        raise LgpError(f"its patches {tuple(patches.shape)} or positions {tuple(positions.shape)} are of no ViT")
    with torch.device("meta"):  # shapes without memory
        return VisionTransformer(
            img_size=int((positions.shape[-2] - 1) ** 0.5) * patches.shape[-1],
            patch_size=patches.shape[-1],
            in_chans=patches.shape[1],
            num_classes=0,
            embed_dim=len(patches),
            depth=1,
            num_heads=1,
            no_embed_class="register_tokens" in tensors,
        )


def from_hugging_face(tensors: Tensors) -> Renamed:
    """Rename the tensors of `ViTMAEForPreTraining`, `ViTMAEModel` or `ViTModel` of transformers.

    Raises:
        LgpError: a tensor is no weight, or the parts of a block's attention do not fit each other.
    """
    renamed = Renamed()
    parts: dict[str, dict[str, str]] = {}
    for name in tensors:
        own = name.removeprefix("vit.")
        found = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", own)
        if found:
            parts.setdefault(f"blocks.{found[1]}.attn.qkv.{found[3]}", {})[found[2]] = name
            continue
        if own.startswith(("decoder.", "classifier.", "pooler.")):
            renamed.left_out[name] = own.partition(".")[0]
            continue
        for theirs, timms in HUGGING_FACE:
            own = own.replace(theirs, timms)
        if own in renamed.tensors:
            raise LgpError(f"{shown(name)} and {shown(renamed.sources[own])} are one tensor of timm, {shown(own)}")
        renamed.tensors[own], renamed.sources[own] = tensors[name], name
    for target, names in parts.items():
        of_part = {names[part]: tensors[names[part]] for part in QKV if part in names}
        _check(of_part)
        shapes = {tensor.shape for tensor in of_part.values()}
        if len(of_part) != len(QKV) or len(shapes) > 1 or not shapes.pop():
            raise LgpError(f"{', '.join(map(shown, of_part))} are not the queries, keys and values of one block")
        renamed.tensors[target], renamed.sources[target] = torch.cat(list(of_part.values())), " + ".join(of_part)
    return renamed


def _check(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        if fault := fault_of(tensor):
            raise LgpError(f"{shown(name)} {fault}: the file is damaged, or no checkpoint of plain weights")
