"""The parts of the images: test, validation, training.

All choices are seeded and made per class. Classes stay balanced, and no part depends on another's size.
"""

import numpy as np

from lgp.compute.randomness import counted_seed
from lgp.errors import LgpError


def shuffled_by_class(labels: np.ndarray, seed: int, *place: str | int) -> list[np.ndarray]:
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
            "validation (and for test, without a test part): add some, remove the class, or raise "
            "data.max_train_images where it is set"
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
    for c, positions in enumerate(shuffled_by_class(labels, seed, "split", name)):
        if len(positions) < 2:
            raise LgpError(f"class number {c} has {len(positions)} image(s), too few to hold one out for {name}")
        held_out[positions[: min(max(1, round(share * len(positions))), len(positions) - 1)]] = True
    return held_out


def cap(labels: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    """Choose `most` images in proportion to the classes.

    Each class keeps its share rounded down, at least one image. The largest remainders get what is left. Unlabelled
    images count as one more class, which may keep none.

    Args:
        labels: (N,) class indices, -1 where unlabelled. N is at least `most`.
        most: number of images to keep.
        seed: the run's seed.
        name: `train` or `test`. Both are drawn independently.

    Returns:
        (N,) bool, True for exactly `most` images.

    Raises:
        LgpError: `most` is below the number of classes.
    """
    unlabelled = np.random.default_rng(counted_seed(seed, "cap", name, "unlabeled"))
    groups = [*shuffled_by_class(labels, seed, "cap", name), unlabelled.permutation(np.flatnonzero(labels < 0))]
    sizes = np.array([len(group) for group in groups])
    least = (sizes > 0).astype(np.int64)
    least[-1] = 0
    if least.sum() > most:
        raise LgpError(
            f"data.max_{name}_images {most} is below the number of classes, {least.sum()}: each class keeps at least "
            "one image; raise it, or set it to null"
        )
    quota = most * sizes / len(labels)
    taken = np.maximum(most * sizes // len(labels), least)
    while taken.sum() < most:
        taken[np.argmax(quota - taken)] += 1
    while taken.sum() > most:
        taken[np.argmax(np.where(taken > least, taken - quota, -np.inf))] -= 1
    kept = np.zeros(len(labels), dtype=bool)
    for group, number in zip(groups, taken.tolist(), strict=True):
        kept[group[:number]] = True
    return kept
