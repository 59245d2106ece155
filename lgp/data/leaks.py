"""Leaks: test images that also stand among the images to learn from, exactly or nearly.

Exact is byte for byte; near is a perceptual hash (of the lowest frequencies, 64 bits: Zauner 2010, by the library
imagehash) that differs in few bits, as re-encoded, resized or slightly cropped copies do.
"""

from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image

EXACT = -1
QUERIES, CANDIDATES = 256, 2**16  # of a block: 128 MiB of differences


@dataclass(frozen=True)
class Leak:
    """A test image, the image to learn from that is nearest to it, and in how many bits their hashes differ.

    `bits` is `EXACT` where the files are the same.
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
    """Find the test images that also stand among the images to learn from.

    Args:
        content: (N,) digests of the files, of any type that compares.
        hashes: (N,) uint64 perceptual hashes.
        test: positions of the test images.
        learnt: positions of all others.
        most_bits: in how many bits near duplicates differ at most; None: exact ones only.

    Returns:
        One for each such test image, the exact or else the nearest; and the positions of all images to learn from that
        stand in test, which may be more.
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
