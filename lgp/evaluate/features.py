"""Frozen features of images: from an encoder, or the raw pixels as a baseline."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.data.prepared import Prepared

Encode = Callable[[Tensor], Tensor]
BATCH = 256


def class_token_of(encoder: VisionTransformer, device: torch.device) -> Encode:
    """Return the function that gives an encoder's features: the class token after the final norm, (B, D)."""
    encoder = encoder.to(device).eval()

    def encode(images: Tensor) -> Tensor:
        features: Tensor = encoder(images.to(device))
        return features

    return encode


def pixels(images: Tensor) -> Tensor:
    """Give the raw (normalised) pixels as features, (B, C·H·W)."""
    return images.flatten(1)


@torch.inference_mode()
def extract(encode: Encode, data: Prepared, ids: np.ndarray) -> np.ndarray:
    """Compute the features of images as evaluation sees them (no augmentation).

    Args:
        encode: normalised images (B, C, S, S) → features (B, D).
        data: prepared images.
        ids: (N,) image ids.

    Returns:
        (N, D) float32.
    """
    parts = [
        encode(data.normalize(data.whole(ids[i : i + BATCH]))).float().cpu().numpy() for i in range(0, len(ids), BATCH)
    ]
    return np.concatenate(parts)


def standardizer(reference: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map to zero mean and unit deviation per feature, measured on `reference` (N, D).

    Features that do not vary there are only centred.
    """
    # in single precision the mean of a constant misses it by a little, which the division would blow up to 1
    mean, std = reference.mean(axis=0, dtype=np.float64), reference.std(axis=0, dtype=np.float64)
    std[std < 1e-6] = 1.0
    return lambda features: ((features - mean) / std).astype(np.float32)


@dataclass(frozen=True)
class Features:
    """Standardised features of train, val and test, with labels and ids."""

    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]
    classes: int

    @classmethod
    def of(cls, encode: Encode, data: Prepared) -> "Features":
        """Extract them; mean and deviation are those of all training images, which needs no label."""
        ids = {split: data.ids(split) for split in ("train", "val", "test")}
        raw = {split: extract(encode, data, of_split) for split, of_split in ids.items()}
        standardize = standardizer(raw["train"])
        x = {split: standardize(features) for split, features in raw.items()}
        return cls(x, {s: data.labels[i] for s, i in ids.items()}, ids, len(data.classes))
