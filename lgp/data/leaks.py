"""Leaks: test images that also occur among the images to learn from, exactly or nearly.

Exact leaks have equal bytes. Near leaks have perceptual hashes that differ in few bits, as those of re-encoded, resized
or slightly cropped copies do. The hash has 64 bits of the lowest frequencies (Zauner 2010, by the library imagehash).
"""

from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image

EXACT = -1
QUERIES, CANDIDATES = 256, 2**16  # per block: 128 MiB of differences


@dataclass(frozen=True)
class Leak:
    """A test image, the nearest image to learn from, and the number of bits in which their hashes differ.

    `bits` is `EXACT` if the files are the same.
    """

    test: int
    learnt: int
    bits: int


def perceptual_hash(image: Image.Image) -> int:
    """Return the 64-bit perceptual hash of an image."""
    return int(str(imagehash.phash(image)), 16)


def find_leaks(
    content: np.ndarray, hashes: np.ndarray, test: np.ndarray, learnt: np.ndarray, most_bits: int | None
) -> tuple[list[Leak], np.ndarray]:
    """Find the test images that also occur among the images to learn from.

    Args:
        content: (N,) digests of the files, of any hashable type.
        hashes: (N,) uint64 perceptual hashes.
        test: positions of the test images.
        learnt: positions of the images to learn from.
        most_bits: the most bits in which near duplicates differ. None finds exact duplicates only.

    Returns:
        One leak per such test image: the exact one, else the nearest. Then the positions of all images to learn from
        that also occur in test. There may be more of these.
    """
    where = {content[i]: int(i) for i in learnt[::-1]}
    leaks = {int(i): Leak(int(i), where[content[i]], EXACT) for i in test if content[i] in where}
    of_test = {content[i] for i in test}
    in_test = np.array([content[i] in of_test for i in learnt], dtype=bool)
    for start in range(0, len(test) if most_bits is not None else 0, QUERIES):
        queries = test[start : start + QUERIES]
        fewest = np.full(len(queries), 65, dtype=np.int64)
        nearest = np.zeros(len(queries), dtype=np.int64)
        for first in range(0, len(learnt), CANDIDATES):
            candidates = learnt[first : first + CANDIDATES]
            bits = np.bitwise_count(hashes[queries, None] ^ hashes[None, candidates])
            in_test[first : first + CANDIDATES] |= (bits <= most_bits).any(axis=0)
            best = bits.argmin(axis=1)
            least = bits[np.arange(len(queries)), best]
            nearest = np.where(least < fewest, candidates[best], nearest)
            fewest = np.minimum(fewest, least)
        for i, of, bits_apart in zip(queries.tolist(), nearest.tolist(), fewest.tolist(), strict=True):
            if most_bits is not None and bits_apart <= most_bits:
                leaks.setdefault(i, Leak(i, of, bits_apart))
    return sorted(leaks.values(), key=lambda leak: (leak.bits, leak.test)), learnt[in_test]
