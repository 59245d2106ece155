"""The parts of the images: test, validation, training, and the few-label subsets.

All choices are seeded and made per class. Classes stay balanced, and no part depends on another's size.
"""

import numpy as np

from lgp.compute.randomness import counted_seed
from lgp.errors import LgpError
from lgp.params.labels import shot_name


def _shuffled_by_class(labels: np.ndarray, seed: int, *place: str | int) -> list[np.ndarray]:
    """Return, for each class, the positions of its images in random order."""
    classes = range(int(labels.max()) + 1)
    rng = [np.random.default_rng(counted_seed(seed, *place, c)) for c in classes]
    return [rng[c].permutation(np.flatnonzero(labels == c)) for c in classes]


def check_class_sizes(labels: np.ndarray, classes: list[str], needed: int) -> None:
    """Raise `LgpError` if there are fewer than two classes, or if one has fewer than `needed` training images.

    Args:
        labels: (N,) class indices of the training images, -1 where unlabelled.
        classes: class names.
        needed: 3 if test and validation are held out, 2 if only validation is, 1 if nothing is.
    """
    counts = np.bincount(labels[labels >= 0], minlength=len(classes)).tolist()
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise LgpError(f"no readable training image in class {', '.join(empty)}: add some, or remove the class")
    if len(classes) < 2:
        raise LgpError(f"the only class is {classes[0]!r}: evaluation needs two or more, add another class folder")
    scarce = [f"{name} ({count})" for name, count in zip(classes, counts, strict=True) if count < needed]
    if scarce:
        raise LgpError(
            f"fewer than {needed} readable training images in class {', '.join(scarce)}: one each is held out for "
            "validation (and for test, without a test part), add some or remove the class"
        )


def hold_out(labels: np.ndarray, share: float, seed: int, name: str) -> np.ndarray:
    """Choose a stratified held-out part.

    Args:
        labels: (N,) class indices, all ≥ 0.
        share: fraction of each class, rounded. At least one image is held out, and at least one is not.
        seed: the run's seed.
        name: name of the part. Parts of other names are drawn independently.

    Returns:
        (N,) bool, True where held out.

    Raises:
        LgpError: a class has too few images.
    """
    held_out = np.zeros(len(labels), dtype=bool)
    for c, positions in enumerate(_shuffled_by_class(labels, seed, "split", name)):
        if len(positions) < 2:
            raise LgpError(f"class number {c} has {len(positions)} image(s), too few to hold one out for {name}")
        held_out[positions[: min(max(1, round(share * len(positions))), len(positions) - 1)]] = True
    return held_out


def cap(labels: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    """Choose `most` images in proportion to the classes (rounded, at least one each): (N,) bool, True where kept."""
    kept = np.zeros(len(labels), dtype=bool)
    share = most / len(labels)
    for positions in _shuffled_by_class(labels, seed, "cap", name):
        kept[positions[: max(1, round(share * len(positions)))]] = True
    return kept


def few_label_subsets(
    labels: np.ndarray, shares: dict[str, float], shots: list[int], subsets: int, seed: int, classes: list[str]
) -> dict[str, list[list[int]]]:
    """Draw class-balanced few-label subsets. They are nested: every larger subset contains each smaller one.

    Every class gives the same number of images. For a share this is `share × N / classes`, rounded, at least one. A
    class that has fewer gives all of them. For a shot it is the shot itself.

    Args:
        labels: (N,) class indices of the labelled training images.
        shares: name → share of N, e.g. `{"1pct": 0.01}`.
        shots: numbers of images per class. A shot of 5 is named `5shot`.
        subsets: number of independent draws.
        seed: the run's seed.
        classes: class names.

    Returns:
        name → one sorted list of positions into `labels` per draw.

    Raises:
        LgpError: a class has fewer images than a shot needs. The message names such classes.
    """
    found = np.bincount(labels, minlength=len(classes))
    for shot in shots:
        scarce = [f"{name} ({count})" for name, count in zip(classes, found.tolist(), strict=True) if count < shot]
        if scarce:
            raise LgpError(
                f"labels.shots asks for {shot} images of each class, fewer are in the training part of "
                f"{', '.join(scarce)}: lower it, or add images"
            )
    per_class = {name: max(1, round(share * len(labels) / len(classes))) for name, share in shares.items()}
    per_class |= {shot_name(shot): shot for shot in shots}
    drawn = [_shuffled_by_class(labels, seed, "few-label", s) for s in range(subsets)]
    return {
        name: [sorted(int(i) for of_class in d for i in of_class[:number]) for d in drawn]
        for name, number in per_class.items()
    }
