"""The draw of the few-label subsets: seeded, balanced over classes, nested."""

import numpy as np

from lgp.data.splits import shuffled_by_class
from lgp.errors import LgpError
from lgp.params.labels import shot_name


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
    drawn = [shuffled_by_class(labels, seed, "few-label", s) for s in range(subsets)]
    return {
        name: [sorted(int(i) for of_class in d for i in of_class[:number]) for d in drawn]
        for name, number in per_class.items()
    }
