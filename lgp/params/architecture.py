"""The plain ViTs of timm, by name. Their dimensions are timm's, and so are not typed into the parameters."""

import difflib
from functools import cache
from typing import Any, NamedTuple

from lgp.errors import shortened

LONGEST = 60  # characters of a name in a message


class Architecture(NamedTuple):
    """A plain ViT of timm.

    Attributes:
        patch_size: side of a patch, pixels.
        width: embedding width.
        depth: number of blocks.
        heads: attention heads of a block.
        changes: arguments of timm that differ from those of the name.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    changes: dict[str, Any]


@cache
def architecture(name: str) -> Architecture:
    """Look up a plain ViT of timm: one sequence of patches, positions that are added, blocks of attention and MLP.

    Registers, LayerScale, SwiGLU and a norm before the blocks are parts of it. The pooling by attention of SigLIP is
    not: such an encoder gives the average of its patches.

    Raises:
        ValueError: timm has no such name, or it is no plain ViT; the message gives the reason.
    """
    # slow to import, and only needed by who names an architecture
    import timm
    import torch

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models("vit_*"), 3)
        raise ValueError(
            f"timm has no model {shortened(name, LONGEST)!r}: choose a plain ViT, e.g. "
            f"{', '.join(near) or 'vit_small_patch16_224'}"
        )
    if "." in name:
        raise ValueError(f"{name!r} names weights too: give the architecture alone, {name.partition('.')[0]!r}")
    with torch.device("meta"):  # shapes without memory
        model = timm.create_model(name, num_classes=0)
    if reason := _why_not_plain(model):
        raise ValueError(f"{name!r} is no plain ViT, as {reason}: choose one that timm builds as VisionTransformer")
    changes: dict[str, Any] = {"dynamic_img_size": False} if model.dynamic_img_size else {}
    if model.attn_pool is not None:
        changes |= {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": False}
    heads = model.blocks[0].attn.num_heads
    return Architecture(model.patch_embed.patch_size[0], model.embed_dim, len(model.blocks), heads, changes)


def _why_not_plain(model: Any) -> str:
    """Return the reason why a model of timm is no plain ViT; empty if it is one."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Block, VisionTransformer

    if type(model) is not VisionTransformer:
        return f"timm builds it as {type(model).__name__}"
    if type(model.blocks[0]) is not Block:
        return f"its blocks are of another kind ({type(model.blocks[0]).__name__})"
    if type(model.patch_embed) is not PatchEmbed:
        return "its patches come from a convolutional network"
    if model.pos_embed is None:
        return "it has no positions that are added to the patches"
    return "its patches are not square" if len(set(model.patch_embed.patch_size)) > 1 else ""
