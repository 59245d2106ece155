"""Frozen features of images: from an encoder, after any of its blocks, or the raw pixels as a baseline."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.compute.precision import choose_frozen_precision
from lgp.data.loading import PART_BYTES, read_batches, sliced
from lgp.data.storage import Images
from lgp.models.vit import pooled_by_block
from lgp.params.run import RunParams
from lgp.params.section import Interpolation

Encode = Callable[[Tensor], Tensor]
BATCH = 256
CPU = torch.device("cpu")
FEW = 256  # images for which no process is started


@dataclass(frozen=True)
class Running:
    """How features are computed. On a CPU it changes no byte of them.

    Attributes:
        workers: processes that read images; 0: this one.
        device: where images are normalised. The network is on the same device.
        precision: of matrix products.
    """

    workers: int = 0
    device: torch.device = CPU
    precision: torch.dtype = torch.float32

    @classmethod
    def of(cls, settings: RunParams, device: torch.device) -> "Running":
        """Return how the section `run` asks for it, on a device."""
        return cls(settings.workers, device, choose_frozen_precision(settings, device))


ALONE = Running()


def all_runnings() -> list[Running]:
    """Return all devices and precisions that decide the last digits of features."""
    cuda = torch.device("cuda")
    return [ALONE, Running(device=cuda), Running(device=cuda, precision=torch.bfloat16)]


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
    encode: Encode, data: Images, ids: np.ndarray, interpolation: Interpolation = "bilinear", running: Running = ALONE
) -> Iterator[np.ndarray]:
    """Yield the features of images without augmentation, batch by batch, float32.

    Workers decode the images of later batches while features of one are computed.
    """
    mixed = running.precision != torch.float32
    for squares in _squares(data, ids, interpolation, running):
        with torch.autocast(running.device.type, running.precision) if mixed else nullcontext():
            features = encode(data.normalize(squares))
        yield features.float().cpu().numpy()


def _squares(data: Images, ids: np.ndarray, interpolation: Interpolation, running: Running) -> Iterator[Tensor]:
    """Yield the squares of images on the device, batch by batch, (B, C, S, S) uint8."""
    part = max(PART_BYTES // (data.channels * data.image_size**2), 1)
    workers = min(running.workers, math.ceil(len(ids) / min(part, BATCH))) if len(ids) > FEW else 0

    def parts_of(batch: int) -> list[slice]:
        rows = slice(batch * BATCH, min((batch + 1) * BATCH, len(ids)))
        return sliced(rows, part) if workers else [rows]

    def read(_batch: int, rows: slice) -> Tensor:
        return data.whole(ids[rows], interpolation)

    return read_batches(data, read, range(math.ceil(len(ids) / BATCH)), parts_of, workers, running.device)


def extract(
    encode: Encode, data: Images, ids: np.ndarray, interpolation: Interpolation = "bilinear", running: Running = ALONE
) -> np.ndarray:
    """Return the features of images without augmentation.

    Args:
        encode: normalised images (B, C, S, S) → features (B, D).
        data: prepared images.
        ids: (N,) image ids.
        interpolation: of the resizing.
        running: how they are computed.

    Returns:
        (N, D) float32.
    """
    return np.concatenate(list(extracted(encode, data, ids, interpolation, running)))
