"""The draw of the few-label subsets: seeded, balanced over classes, nested."""

from collections.abc import Sequence

import numpy as np

from lgp.data.splits import shuffled_by_class
from lgp.errors import LgpError
from lgp.params.labels import LabelsParams, shot_name


def few_label_subsets(
    labels: np.ndarray,
    identities: Sequence[str],
    params: LabelsParams,
    seed: int,
    classes: list[str],
    groups: Sequence[str | None],
) -> dict[str, list[list[int]]]:
    """Draw class-balanced few-label subsets. They are nested: every larger subset contains each smaller one.

    Every class gives the same number of images. For a share this is `share × N / classes`, rounded, at least one. A
    class that has fewer gives all of them. For a shot it is the shot itself. With `labels.whole_groups` a subset has
    either all images of a class and group or none, and may therefore have a few images more.

    Args:
        labels: (N,) class indices of the labelled training images.
        identities: of these images. They decide the order in which images are drawn.
        params: the section `labels`.
        seed: the run's seed.
        classes: class names.
        groups: of these images, None where an image is a group of its own.

    Returns:
        name → one sorted list of positions into `labels` per draw.

    Raises:
        LgpError: a class has fewer images than a shot needs. The message names such classes.
    """
    if not classes:
        return {}
    found = np.bincount(labels, minlength=len(classes))
    for shot in params.shots:
        scarce = [f"{name} ({count})" for name, count in zip(classes, found.tolist(), strict=True) if count < shot]
        if scarce:
            raise LgpError(
                f"labels.shots asks for {shot} images of each class, fewer are in the training part of "
                f"{', '.join(scarce)}: lower it, or add images"
            )
    per_class = {name: max(1, round(share * len(labels) / len(classes))) for name, share in params.shares.items()}
    per_class |= {shot_name(shot): shot for shot in params.shots}
    units = [i if g is None else f"group {g}" for i, g in zip(identities, groups, strict=True)]
    ordered_by = units if params.whole_groups else identities
    drawn = [shuffled_by_class(labels, ordered_by, seed, "few-label", s) for s in range(params.subsets)]
    whole = np.array(units if params.whole_groups else range(len(labels)), dtype=object)
    return {
        name: [
            sorted(int(i) for of_class in d for i in of_class[: _to_the_end(whole[of_class], number)]) for d in drawn
        ]
        for name, number in per_class.items()
    }


def _to_the_end(units: np.ndarray, number: int) -> int:
    """Return the smallest number of images from `number` on that cuts no unit. Images of a unit follow each other."""
    while 0 < number < len(units) and units[number] == units[number - 1]:
        number += 1
    return number
