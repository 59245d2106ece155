"""Leaks: test images that also occur among the images to learn from, exactly or nearly.

Exact leaks have equal pixels. Near leaks have perceptual hashes that differ in few bits, as those of re-encoded,
resized or slightly cropped copies do. The hash has 64 bits of the lowest frequencies (Zauner 2010). It is that of the
library imagehash, bit for bit.

Hashes that differ in at most b of 64 bits agree in at least one of b + 1 bands of them. Only hashes that share a band
are compared.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

EXACT = -1
PAIRS = 2**21  # hashes that are compared at once: about 100 MB
STACKED = 2**22  # pixels that are reduced at once
SIDE, LOW = 32, 8  # pixels of a reduced image, and frequencies of the hash, in each direction


@dataclass(frozen=True)
class Leak:
    """A test image, the nearest image to learn from, and the number of bits in which their hashes differ.

    `bits` is `EXACT` if their pixels are the same.
    """

    test: int
    learnt: int
    bits: int


def perceptual_hashes(images: Sequence[np.ndarray]) -> np.ndarray:
    """Return the 64-bit perceptual hash of each image, (N,) uint64.

    Args:
        images: (H, W, C) uint8. Alpha (of 2 or 4 channels) does not count. More than 4 channels count by their mean.
    """
    from scipy.fft import dct

    reduced = np.empty((len(images), SIDE, SIDE), dtype=np.uint8)
    for places in _of_one_shape(images):
        one = len(places) == 1  # which may be large, and need not be copied
        reduced[places] = _reduced(images[places[0]][None] if one else np.stack([images[i] for i in places]))
    frequencies = dct(reduced, axis=1)[:, :LOW]
    low = dct(frequencies, axis=2)[:, :, :LOW].reshape(len(images), LOW * LOW)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64)


def _of_one_shape(images: Sequence[np.ndarray]) -> Iterator[list[int]]:
    """Yield places of images of equal shape, in groups that are not too large."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        by_shape.setdefault(image.shape, []).append(place)
    for (height, width, _), places in by_shape.items():
        each = max(1, STACKED // (height * width))
        for start in range(0, len(places), each):
            yield places[start : start + each]


def _reduced(images: np.ndarray) -> np.ndarray:
    """Return images (N, H, W, C) in grey, (N, 32, 32) uint8, as Pillow resizes each of them.

    Pillow resizes rows, then columns. One image that holds all images takes one call for each.
    """
    count, height, width, channels = images.shape
    if channels > 4:
        images, channels = images.mean(axis=3, keepdims=True).astype(np.uint8), 1
    form = (count * height, width) if channels == 1 else (count * height, width, channels)
    grey = Image.fromarray(images.reshape(form)).convert("L")
    rows = np.asarray(grey.resize((SIDE, count * height), Image.Resampling.LANCZOS)).reshape(count, height, SIDE)
    side_by_side = Image.fromarray(np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(height, count * SIDE))
    columns = np.asarray(side_by_side.resize((count * SIDE, SIDE), Image.Resampling.LANCZOS))
    return columns.reshape(SIDE, count, SIDE).swapaxes(0, 1)


def find_leaks(
    content: np.ndarray, hashes: np.ndarray, test: np.ndarray, learnt: np.ndarray, most_bits: int | None
) -> tuple[list[Leak], np.ndarray]:
    """Find the test images that also occur among the images to learn from.

    Args:
        content: (N,) digests of the pixels, of any hashable type.
        hashes: (N,) uint64 perceptual hashes.
        test: positions of the test images.
        learnt: positions of the images to learn from.
        most_bits: the most bits in which near duplicates differ. None finds exact duplicates only.

    Returns:
        One leak per such test image: the exact one, else the nearest, of equally near ones the first. Then the
        positions of all images to learn from that also occur in test. There may be more of these.
    """
    where = {content[i]: int(i) for i in learnt[::-1]}
    leaks = {int(i): Leak(int(i), where[content[i]], EXACT) for i in test if content[i] in where}
    of_test = {content[i] for i in test}
    in_test = np.array([content[i] in of_test for i in learnt], dtype=bool)
    if most_bits is not None and len(test) and len(learnt):
        bits, nearest, near = _nearest(hashes[test], hashes[learnt], most_bits)
        in_test |= near
        for place in np.flatnonzero(bits <= most_bits).tolist():
            leak = Leak(int(test[place]), int(learnt[nearest[place]]), int(bits[place]))
            leaks.setdefault(leak.test, leak)
    return sorted(leaks.values(), key=lambda leak: (leak.bits, leak.test)), learnt[in_test]


def _nearest(queries: np.ndarray, candidates: np.ndarray, most_bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find near hashes.

    Returns:
        For each query the fewest differing bits (65 if these are more than `most_bits`) and the place of the first such
        candidate. For each candidate, whether it is near any query.
    """
    # many equal hashes, as of black images, count once
    asked, of_query = np.unique(queries, return_inverse=True)
    known, first, of_candidate = np.unique(candidates, return_index=True, return_inverse=True)
    best = np.full(len(asked), 65 << 32, dtype=np.int64)  # bits, then place: the least is the nearest, then the first
    near = np.zeros(len(known), dtype=bool)
    for query, candidate in _pairs(asked, known, most_bits):
        bits = np.bitwise_count(asked[query] ^ known[candidate])
        close = bits <= most_bits
        query, candidate = query[close], candidate[close]
        np.minimum.at(best, query, (bits[close].astype(np.int64) << 32) | first[candidate])
        near[candidate] = True
    return (best >> 32)[of_query], (best & (2**32 - 1))[of_query], near[of_candidate]


def _pairs(queries: np.ndarray, candidates: np.ndarray, most_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places of queries and of candidates that share a band, in blocks. A pair may come more than once."""
    bands = list(itertools.pairwise(np.linspace(0, 64, most_bits + 2).astype(int).tolist()))
    pairs = sum(int(_shared(queries, candidates, *band)[2].sum()) for band in bands)
    if pairs > len(queries) * len(candidates):
        bands = [(0, 0)]  # bands of very few bits leave nothing out
    for band in bands:
        order, starts, counts = _shared(queries, candidates, *band)
        ends = np.cumsum(counts)
        for query in np.split(np.arange(len(queries)), np.flatnonzero(np.diff(ends // PAIRS)) + 1):
            of_block = counts[query]
            within = np.arange(of_block.sum()) - np.repeat(np.cumsum(of_block) - of_block, of_block)
            yield np.repeat(query, of_block), order[np.repeat(starts[query], of_block) + within]


def _shared(
    queries: np.ndarray, candidates: np.ndarray, start: int, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort candidates by the bits [start, end).

    Returns:
        The sorted places of the candidates. For each query, where in that order the candidates with its bits begin, and
        how many these are.
    """
    width = np.uint64(2 ** (end - start) - 1)
    ours, theirs = (hashes >> np.uint64(start) & width for hashes in (queries, candidates))
    order = np.argsort(theirs, kind="stable")
    theirs = theirs[order]
    starts = np.searchsorted(theirs, ours, side="left")
    return order, starts, np.searchsorted(theirs, ours, side="right") - starts
