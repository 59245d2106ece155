"""Mean and standard deviation per channel of the training images, or of a sample, as squares that evaluation sees.

Of few images, the sums are taken as each is decoded for the first time. Of many, a sample is decoded again, as nobody
knows before the last image which are of train.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lgp.compute.processes import pool
from lgp.data.stored import ARRAY, StoredImages

SAMPLE, CHUNK = 10_000, 256  # images
TOGETHER = 64  # that are decoded before they are counted

Statistics = tuple[list[float], list[float]]


def takes_all(images: int) -> bool:
    """Return whether the sample is all training images, however many of these images are of train."""
    return images < 2 * SAMPLE


def sums_of(pixels: np.ndarray) -> np.ndarray:
    """Return the sum of the values, and of their squares, of pixels (..., C) uint8: (2, C) int64."""
    channels, values = pixels.shape[-1], np.arange(256)
    counts = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(channels)])
    return np.stack([counts @ values, counts @ values**2])


def of_sums(sums: Sequence[bytes], pixels: int) -> Statistics:
    """Return mean and standard deviation, of pixels in [0, 1].

    Args:
        sums: of each image, as `sums_of` returns them.
        pixels: of each image.
    """
    each = np.frombuffer(b"".join(sums), dtype=np.int64).reshape(len(sums), 2, -1)
    return _statistics(each.sum(axis=0), pixels * len(sums))


def of_stored(images: StoredImages) -> Statistics:
    """Return the same of the training images in a folder, or of a sample of them."""
    ids = images.pretraining_ids
    ids = ids[:: max(1, len(ids) // SAMPLE)]
    parts = np.array_split(ids, max(1, len(ids) // CHUNK))
    of_part = partial(_sums_of_stored, images.folder)
    if len(parts) == 1 or (images.folder / ARRAY).exists():
        sums = np.sum(list(map(of_part, parts)), axis=0)
    else:
        with pool() as processes:
            sums = np.sum(list(processes.map(of_part, parts)), axis=0)
    return _statistics(sums, len(ids) * images.image_size**2)


def _statistics(sums: np.ndarray, pixels: int) -> Statistics:
    mean = sums[0] / pixels / 255
    std = np.sqrt(np.maximum(sums[1] / pixels / 255**2 - mean**2, 0))
    # constant images (one flat colour) must not cause a division by zero
    return [round(float(m), 6) for m in mean], [round(max(float(s), 1e-3), 6) for s in std]


def _sums_of_stored(folder: Path, ids: np.ndarray) -> np.ndarray:
    images = StoredImages(folder)
    sums = np.zeros((2, images.channels), dtype=np.int64)
    for start in range(0, len(ids), TOGETHER):
        sums += sums_of(images.squares(ids[start : start + TOGETHER]))
    return sums
