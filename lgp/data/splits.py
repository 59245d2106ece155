"""Which images are held out, and in which order images are drawn.

An image is ordered by a hash of the seed and of its identity. The order of any images is the same wherever they are
stored, and images that are added later come between them. Choices are made per class. Classes stay balanced.
"""

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from lgp.errors import LgpError, escaped

FEW = 5  # labelled images of a class; with fewer, its accuracy says little


def order_keys(identities: Sequence[str], seed: int, *place: str | int) -> np.ndarray:
    """Return a hash (N,) uint64 for each identity. Sorted by it, images are in random order."""
    start = "/".join(map(str, (seed, *place)))
    digests = (
        sha256(f"{start}/{identity}".encode("utf-8", "backslashreplace")).digest()[:8] for identity in identities
    )
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def shuffled_by_class(labels: np.ndarray, identities: Sequence[str], seed: int, *place: str | int) -> list[np.ndarray]:
    """Return, for each class, the positions of its images in random order.

    Args:
        labels: (N,) class indices, -1 where unlabelled.
        identities: what each image is ordered by.
        seed: the run's seed.
        place: what the order is for. Orders for different places are independent.
    """
    order = np.argsort(order_keys(identities, seed, *place), kind="stable")
    return [order[labels[order] == c] for c in range(int(labels.max(initial=-1)) + 1)]


def hold_out(
    labels: np.ndarray, identities: Sequence[str], groups: Sequence[str | None], share: float, seed: int, name: str
) -> np.ndarray:
    """Choose a stratified held-out part of labelled images. A group is held out as a whole, or not at all.

    Args:
        labels: (N,) class indices, -1 where unlabelled.
        identities: of the images. Images of equal identity stay together.
        groups: of the images, None where an image is a group of its own.
        share: fraction of the labelled images of each class, rounded. At least one image of a class is held out,
            unless the class would then have none left.
        seed: the run's seed.
        name: name of the part. Parts of other names are drawn independently.

    Returns:
        (N,) bool, True where held out. Unlabelled images are held out only with their group.
    """
    import pandas as pd

    units = [
        identity if group is None else f"group {group}" for identity, group in zip(identities, groups, strict=True)
    ]
    unit_of, names = pd.factorize(np.array(units, dtype=object))
    labelled = labels >= 0
    sizes = np.bincount(unit_of[labelled], minlength=len(names))
    classes = _most_frequent(unit_of[labelled], labels[labelled], len(names))
    chosen = np.zeros(len(names), dtype=bool)
    for order in shuffled_by_class(classes, names.tolist(), seed, "hold out", name):
        chosen[_chosen(order, sizes, share)] = True
    return chosen[unit_of]


def _most_frequent(unit_of: np.ndarray, labels: np.ndarray, units: int) -> np.ndarray:
    """Return the most frequent label of each unit, of equally frequent ones the lowest; -1 without a label.

    Args:
        unit_of: (N,) the unit of each label.
        labels: (N,) class indices.
        units: their number.
    """
    pairs, counts = np.unique(np.stack([unit_of, labels]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -counts, pairs[0]))
    of_unit, first = np.unique(pairs[0][order], return_index=True)
    most = np.full(units, -1, dtype=np.int64)
    most[of_unit] = pairs[1][order][first]
    return most


def _chosen(order: np.ndarray, sizes: np.ndarray, share: float) -> list[int]:
    """Return the units of a class that are held out: about `share` of their images, and never the last unit."""
    quota = max(1, round(share * int(sizes[order].sum())))
    chosen: list[int] = []
    taken = 0
    for unit, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        if len(chosen) < len(order) - 1 and taken + size <= quota:
            chosen.append(unit)
            taken += size
    if not chosen and len(order) > 1:
        chosen = [int(order[np.argmin(sizes[order])])]
    return chosen


def cap(
    labels: np.ndarray,
    identities: Sequence[str],
    most: int,
    seed: int,
    name: str,
    held_out: np.ndarray | None = None,
    shares: Sequence[float] = (),
) -> np.ndarray:
    """Choose `most` images in proportion to the classes.

    Each class keeps its share rounded down, at least one image. The largest remainders get what is left. Unlabelled
    images count as one more class, which may keep none.

    Images that are held out are all kept, whatever their number. Of a class, as many of them count as a draw from its
    share holds out. So the same images are chosen before and after they are drawn, and new images displace none of
    them.

    Args:
        labels: (N,) class indices, -1 where unlabelled. N is at least `most`.
        identities: what each image is ordered by.
        most: number of images to keep.
        seed: the run's seed.
        name: `train` or `test`. Both are drawn independently.
        held_out: (N,) bool, those that are held out of these images. None: none is.
        shares: of the labelled images that are held out, one after the other.

    Returns:
        (N,) bool, True for exactly `most` images, and for those held-out ones that do not count.

    Raises:
        LgpError: `most` is below the number of classes.
    """
    unlabelled = shuffled_by_class(np.where(labels < 0, 0, -1), identities, seed, "cap", name)
    classes = shuffled_by_class(labels, identities, seed, "cap", name)
    quotas = _quotas([*map(len, classes), sum(map(len, unlabelled))], most, name)
    kept = np.zeros(len(labels), dtype=bool) if held_out is None else held_out.copy()
    count = [min(_drawn(quota, shares), int(kept[rows].sum())) for rows, quota in zip(classes, quotas, strict=False)]
    for rows, quota, counted in zip([*classes, *unlabelled], quotas, [*count, 0], strict=False):
        kept[rows[~kept[rows]][: quota - counted]] = True
    return kept


def _quotas(sizes: Sequence[int], most: int, name: str) -> list[int]:
    """Return how many of `most` images each class has. The last size is of the unlabelled images."""
    of = np.array(sizes)
    least = (of > 0).astype(np.int64)
    least[-1] = 0
    if least.sum() > most:
        raise LgpError(
            f"data.max_{name}_images {most} is below the number of classes, {least.sum()}: each class keeps at least "
            "one image; raise it, or set it to null"
        )
    exact = most * of / of.sum()
    taken = np.maximum(most * of // of.sum(), least)
    while taken.sum() < most:
        taken[np.argmax(exact - taken)] += 1
    while taken.sum() > most:
        taken[np.argmax(np.where(taken > least, taken - exact, -np.inf))] -= 1
    return taken.tolist()


def _drawn(images: int, shares: Sequence[float]) -> int:
    """Return how many of a class are held out, where none is in a group. One image stays."""
    left = images
    for share in filter(None, shares):
        left -= min(max(1, round(share * left)), max(left - 1, 0))
    return images - left


def notes_on_classes(counts: dict[str, int], held_out: bool) -> list[str]:
    """Return what is to be told of classes with few labelled images, a line each.

    Args:
        counts: class → number of its labelled images, given and held out together.
        held_out: whether test or val images were drawn from these.
    """
    if not any(counts.values()):
        return [
            "no image has a label: encoders can be trained (`dvc repro mim cl graft`), nothing can be evaluated; "
            "`lgp labels add FILE` adds labels"
        ]
    notes = []
    there = [name for name, count in counts.items() if count]
    if len(there) == 1:
        notes.append(f"all labels are of one class ({there[0]}): there is nothing to tell apart")
    empty = [name for name, count in counts.items() if not count]
    if empty:
        notes.append(f"no labelled image of {few_names(empty)}: not evaluated")
    scarce = [f"{name} ({count})" for name, count in counts.items() if 0 < count < FEW]
    if scarce:
        more = (
            "; one image of a class stays for training, so some of these are in no test or validation part"
            if held_out
            else ""
        )
        notes.append(f"fewer than {FEW} labelled images of {few_names(scarce)}: their accuracy says little{more}")
    return notes


def few_names(names: Sequence[str], shown: int = 10) -> str:
    """Return the first names of classes on one line, and how many more there are."""
    return ", ".join(map(escaped, names[:shown])) + (
        f" and {len(names) - shown} more classes" if len(names) > shown else ""
    )
