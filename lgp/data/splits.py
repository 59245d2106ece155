"""Who is in which part: test, validation, training, and the few-label subsets.

All choices are per class and seeded, so classes stay balanced and no part depends on another's size.
"""

import numpy as np

from lgp.errors import LgpError
from lgp.randomness import counted_seed


def _shuffled_by_class(labels: np.ndarray, seed: int, *place: str | int) -> list[np.ndarray]:
    """Return, for each class, the positions of its images in random order."""
    classes = range(int(labels.max()) + 1)
    rng = [np.random.default_rng(counted_seed(seed, *place, c)) for c in classes]
    return [rng[c].permutation(np.flatnonzero(labels == c)) for c in classes]


def hold_out(labels: np.ndarray, share: float, seed: int, name: str) -> np.ndarray:
    """Choose a stratified held-out part.

    Args:
        labels: (N,) class indices, all ≥ 0.
        share: of each class, rounded; at least one image is held out and at least one stays behind.
        seed: the run's seed.
        name: of the part; parts of other names are drawn independently.

    Returns:
        (N,) bool, True where held out.

    Raises:
        LgpError: a class has fewer than two images.
    """
    held = np.zeros(len(labels), dtype=bool)
    for c, positions in enumerate(_shuffled_by_class(labels, seed, "split", name)):
        if len(positions) < 2:
            raise LgpError(f"class number {c} has {len(positions)} image(s), too few to hold one out for {name}")
        held[positions[: min(max(1, round(share * len(positions))), len(positions) - 1)]] = True
    return held


def cap(labels: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    """Choose `most` images, classes kept in proportion (rounded, at least one each); (N,) bool, True = kept."""
    kept = np.zeros(len(labels), dtype=bool)
    share = most / len(labels)
    for positions in _shuffled_by_class(labels, seed, "cap", name):
        kept[positions[: max(1, round(share * len(positions)))]] = True
    return kept


def few_label_subsets(
    labels: np.ndarray, shares: dict[str, float], subsets: int, seed: int
) -> dict[str, list[list[int]]]:
    """Draw class-balanced few-label subsets, nested: a smaller share lies within every larger one.

    Every class gets the same number of images, `share × N / classes` rounded, at least one (a class that
    has fewer gives all it has).

    Args:
        labels: (N,) class indices of the labelled training images.
        shares: name → share of N, e.g. `{"1pct": 0.01}`.
        subsets: how many independent draws.
        seed: the run's seed.

    Returns:
        name → one sorted list of positions into `labels` per draw.
    """
    classes = int(labels.max()) + 1
    drawn = [_shuffled_by_class(labels, seed, "few-label", s) for s in range(subsets)]
    result = {}
    for name, share in shares.items():
        per_class = max(1, round(share * len(labels) / classes))
        result[name] = [sorted(int(i) for of_class in d for i in of_class[:per_class]) for d in drawn]
    return result
