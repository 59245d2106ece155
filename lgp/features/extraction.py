"""Frozen features of images: from an encoder, after any of its blocks, or the raw pixels as a baseline."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.data.storage import Images
from lgp.models.vit import pooled_by_block
from lgp.params.section import Interpolation

Encode = Callable[[Tensor], Tensor]
BATCH = 256


def features_of(encoder: VisionTransformer, device: torch.device) -> Encode:
    """Return the function that gives an encoder's features, (B, D): the class token after the final norm, if any."""
    encoder = encoder.to(device).eval()

    def encode(images: Tensor) -> Tensor:
        features: Tensor = encoder(images.to(device))
        return features

    return encode


def by_block_of(encoder: VisionTransformer, pool: str, blocks: int, device: torch.device) -> Encode:
    """Return the function that gives the features after each of the last blocks, through the final norm.

    Its results are (B, blocks, D).

    Args:
        encoder: set to evaluation mode.
        pool: `class_token`, or `average` of the patches.
        blocks: number of last blocks.
        device: where to compute.
    """
    encoder = encoder.to(device).eval()

    return lambda images: pooled_by_block(encoder, images.to(device), pool, blocks)


def pixels(images: Tensor) -> Tensor:
    """Return the raw (normalised) pixels as features, (B, C·H·W)."""
    return images.flatten(1)


@torch.inference_mode()
def extracted(
    encode: Encode, data: Images, ids: np.ndarray, interpolation: Interpolation = "bilinear"
) -> Iterator[np.ndarray]:
    """Yield the features of images without augmentation, batch by batch, float32."""
    for start in range(0, len(ids), BATCH):
        yield encode(data.normalize(data.whole(ids[start : start + BATCH], interpolation))).float().cpu().numpy()


def extract(encode: Encode, data: Images, ids: np.ndarray, interpolation: Interpolation = "bilinear") -> np.ndarray:
    """Return the features of images without augmentation.

    Args:
        encode: normalised images (B, C, S, S) → features (B, D).
        data: prepared images.
        ids: (N,) image ids.
        interpolation: of the resizing.

    Returns:
        (N, D) float32.
    """
    return np.concatenate(list(extracted(encode, data, ids, interpolation)))
