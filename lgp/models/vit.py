"""The encoder: timm's ViT with fixed 2D sin-cos positions, initialised as in MAE or MoCo v3.

Under `model.timm` it is another plain ViT of timm: with registers, LayerScale, a norm before the blocks, SwiGLU, or
without a class token. Its positions learn. Prefix tokens are the class token and the registers.
"""

import math
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.params.architecture import architecture
from lgp.params.data import DataParams
from lgp.params.model import ModelParams

# without `model.timm`: model_args set all dimensions and are stored in the encoder folder's config.json
ARCHITECTURE = "vit_base_patch16_224"


def sincos_positions(width: int, grid: int, prefix: int = 1) -> Tensor:
    """Compute fixed 2D sin-cos positions (MoCo v3, section 5; MAE, appendix A.1).

    Columns come first, as in MAE's released code. MoCo v3's code has rows first: the same up to a transposition.
    A patch in column x and row y gets `[sin(xω), cos(xω), sin(yω), cos(yω)]` with
    ω_k = 10000^(-k / (width / 4)), k = 0 … width/4 - 1. The class token gets zeros, as do other prefix tokens.

    Args:
        width: embedding width, a multiple of 4.
        grid: patches per side.
        prefix: number of prefix tokens.

    Returns:
        (1, prefix + grid², width) float32.
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    places = torch.arange(grid, dtype=torch.float64)
    y, x = torch.meshgrid(places, places, indexing="ij")
    angles_x, angles_y = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    patches = torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)
    return torch.cat([torch.zeros(prefix, width), patches.float()])[None]


def architecture_of(model: ModelParams) -> str:
    """Return timm's name of the architecture."""
    return model.timm or ARCHITECTURE


def model_args(model: ModelParams, data: DataParams) -> dict[str, Any]:
    """Return the arguments that make timm's architecture our encoder."""
    return {
        "img_size": data.image_size,
        "patch_size": model.patch_size,
        "in_chans": data.channels,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        **(architecture(model.timm).changes if model.timm else {}),
    }


def build_encoder(model: ModelParams, data: DataParams) -> VisionTransformer:
    """Build the encoder without a head. Its features, (B, width), are the class token after the final norm.

    An encoder without a class token gives the average of its patches.
    """
    encoder: VisionTransformer = timm.create_model(architecture_of(model), num_classes=0, **model_args(model, data))
    if model.timm is None:
        with torch.no_grad():
            encoder.pos_embed.copy_(sincos_positions(model.width, data.image_size // model.patch_size))
    encoder.pos_embed.requires_grad_(positions_learn(model))
    return encoder


def positions_learn(model: ModelParams) -> bool:
    """Return whether the positions learn: those of a ViT of timm do, the paper's 2D sin-cos positions do not."""
    return model.timm is not None


def freeze_pooling(encoder: VisionTransformer) -> None:
    """Freeze the norm after the pooling, which some ViTs have: no loss of single tokens reaches it."""
    encoder.fc_norm.requires_grad_(False)


def init_as_mae(module: nn.Module) -> None:
    """Initialise every linear and norm layer below `module` as MAE does: Xavier uniform, zero bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


def init_encoder_as_mae(encoder: VisionTransformer) -> None:
    """Initialise the encoder as MAE does: `init_as_mae`, patches as a linear layer, class token N(0, 0.02²).

    The patch projection's bias starts at zero here. MAE's released code leaves it at the convolution's default.
    """
    init_as_mae(encoder)
    projection = encoder.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
    _init_bias_and_prefix(encoder, 0.02)


def init_encoder_as_moco(encoder: VisionTransformer) -> None:
    """Initialise the encoder as MoCo v3 does.

    Weights are Xavier uniform. Queries, keys and values count as three layers. The patch projection counts as a linear
    layer from patch pixels to width. The class token is N(0, 1e-6²).
    """
    init_as_mae(encoder)
    for block in encoder.blocks:
        weight = block.attn.qkv.weight
        bound = math.sqrt(6.0 / (weight.shape[0] // 3 + weight.shape[1]))
        nn.init.uniform_(weight, -bound, bound)
    projection = encoder.patch_embed.proj
    bound = math.sqrt(6.0 / (projection.weight[0].numel() + projection.weight.shape[0]))
    nn.init.uniform_(projection.weight, -bound, bound)
    _init_bias_and_prefix(encoder, 1e-6)


def _init_bias_and_prefix(encoder: VisionTransformer, std: float) -> None:
    if encoder.patch_embed.proj.bias is not None:  # none before a norm, as in CLIP
        nn.init.zeros_(encoder.patch_embed.proj.bias)
    for token in _prefix_tokens(encoder):
        nn.init.normal_(token, std=std)


class View(NamedTuple):
    """A view of each image of a batch: the input of a contrastive model."""

    images: Tensor  # (B, C, S, S), normalised; S may be smaller than the encoder's
    ids_keep: Tensor | None = None  # (B, n), the visible patches; None: all


def embed(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """Turn images (B, C, S, S) into patch tokens with their positions, (B, N, width), no prefix tokens.

    Images of another size than the encoder's get its positions resampled to their grid, as DINO does for small crops.
    """
    positions = encoder.pos_embed if encoder.no_embed_class else encoder.pos_embed[:, encoder.num_prefix_tokens :]
    if not is_other_size(encoder, images):
        return encoder.patch_embed(images) + positions
    patches = encoder.patch_embed.proj(images)  # its `forward` refuses other sizes
    grid = list(patches.shape[-2:])
    resampled = resample_abs_pos_embed(positions, grid, num_prefix_tokens=0, antialias=False)
    return encoder.patch_embed.norm(patches.flatten(2).transpose(1, 2)) + resampled


def is_other_size(encoder: VisionTransformer, images: Tensor) -> bool:
    """Return whether images (B, C, S, S) have another size than the encoder's."""
    return tuple(images.shape[-2:]) != tuple(encoder.patch_embed.img_size)


def _prefix_tokens(encoder: VisionTransformer) -> list[Tensor]:
    return [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]


def with_prefix(encoder: VisionTransformer, tokens: Tensor) -> Tensor:
    """Put the P prefix tokens before tokens (B, n, width): (B, P + n, width). The first norm follows, if there is one.

    The class token comes first. It is the only one in the paper's encoder.
    """
    if own := _prefix_tokens(encoder):
        prefix = torch.cat(own, dim=1)
        if not encoder.no_embed_class:
            prefix = prefix + encoder.pos_embed[:, : encoder.num_prefix_tokens]
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    return encoder.norm_pre(tokens)


def encode_tokens(encoder: VisionTransformer, tokens: Tensor) -> Tensor:
    """Put the P prefix tokens before tokens (B, n, width), run blocks and final norm: (B, P + n, width)."""
    return encoder.norm(through(encoder.blocks, with_prefix(encoder, tokens), encoder.grad_checkpointing))


def through(blocks: nn.Sequential, tokens: Tensor, checkpointed: bool) -> Tensor:
    """Run blocks on tokens (B, n, D).

    Checkpointed blocks keep their input alone. The backward pass runs each block again for its other activations, with
    the same random state, so losses and gradients are the same.
    """
    passed: Tensor = checkpoint_seq(blocks, tokens) if checkpointed else blocks(tokens)
    return passed


def tokens_by_block(encoder: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Return the tokens of images (B, C, S, S) after each block, passed through the final norm: (B, P + N, width)."""
    tokens, after = with_prefix(encoder, embed(encoder, images)), []
    for block in encoder.blocks:
        tokens = block(tokens)
        after.append(encoder.norm(tokens))
    return after


def pooled(encoder: VisionTransformer, tokens: Tensor, pool: str) -> Tensor:
    """Return the features (B, width) of the tokens (B, P + n, width) after the final norm.

    Args:
        encoder: that gave the tokens.
        tokens: after the final norm.
        pool: `class_token`, or `average` of the patches. An encoder without a class token takes the average.
    """
    if pool == "class_token" and encoder.global_pool == "token":
        return tokens[:, 0]
    return encoder.fc_norm(tokens[:, encoder.num_prefix_tokens :].mean(dim=1))


def pooled_by_block(encoder: VisionTransformer, images: Tensor, pool: str, blocks: int) -> Tensor:
    """Return the features after each of the last blocks, through the final norm, (B, blocks, width).

    Args:
        encoder: in evaluation mode.
        images: (B, C, S, S), normalised.
        pool: `class_token` or `average`, as `pooled` has them.
        blocks: number of last blocks.
    """
    return torch.stack([pooled(encoder, tokens, pool) for tokens in tokens_by_block(encoder, images)[-blocks:]], dim=1)


def keep_patches(tokens: Tensor, ids_keep: Tensor) -> Tensor:
    """Select the patch tokens (B, N, D) named by `ids_keep` (B, n): (B, n, D)."""
    return tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))


def features_of_view(encoder: VisionTransformer, view: View) -> Tensor:
    """Return the features of a view, (B, D): the class token after the final norm, if there is one.

    Only visible patches are encoded.
    """
    if view.ids_keep is None and not is_other_size(encoder, view.images):
        whole: Tensor = encoder(view.images)
        return whole
    return pooled(encoder, encode_tokens(encoder, visible_tokens(encoder, view)), "class_token")


def features_of_last_blocks(encoder: VisionTransformer, view: View, blocks: int) -> Tensor:
    """Return the features of a view after each of the last blocks, (blocks, B, D), those of the last block at the end.

    Those of the last block pass the final norm, as `features_of_view` has them. Those of the others pass none.
    """
    if blocks == 1:
        return features_of_view(encoder, view)[None]
    tokens, found = with_prefix(encoder, visible_tokens(encoder, view)), []
    first = len(encoder.blocks) - blocks
    for number in range(len(encoder.blocks) - 1):
        tokens = through(encoder.blocks[number : number + 1], tokens, encoder.grad_checkpointing)
        if number >= first:
            by_class_token = encoder.global_pool == "token"
            found.append(tokens[:, 0] if by_class_token else tokens[:, encoder.num_prefix_tokens :].mean(dim=1))
    tokens = through(encoder.blocks[-1:], tokens, encoder.grad_checkpointing)
    found.append(pooled(encoder, encoder.norm(tokens), "class_token"))
    return torch.stack(found)


def visible_tokens(encoder: VisionTransformer, view: View) -> Tensor:
    """Return the embedded visible patches of a view, (B, n, width)."""
    tokens = embed(encoder, view.images)
    return tokens if view.ids_keep is None else keep_patches(tokens, view.ids_keep)
