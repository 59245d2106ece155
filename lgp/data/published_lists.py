"""Names of published few-label subsets of ImageNet-1k, and the numbers that a list of that name must have.

The lists themselves belong to their authors. The user downloads them and names them in `labels.lists`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lgp.errors import LgpError


@dataclass(frozen=True)
class PublishedList:
    """What is known of a published subset.

    Attributes:
        origin: who published it, where.
        splits: number of its files.
        classes: images of a class → number of such classes, the same in each file.
        inside: name of the published subset that contains it, if there is one.
    """

    origin: str
    splits: int
    classes: Mapping[int, int]
    inside: str | None = None


SIMCLR = "SimCLR (google-research/simclr, imagenet_subsets)"
MSN = "MSN (facebookresearch/msn, imagenet_subsets1 to 3)"

PUBLISHED = {
    "simclr_1pct": PublishedList(SIMCLR, 1, {12: 189, 13: 811}, inside="simclr_10pct"),
    "simclr_10pct": PublishedList(SIMCLR, 1, {128: 884, 129: 116}),
    "msn_1shot": PublishedList(MSN, 3, {1: 1000}),
    "msn_2shot": PublishedList(MSN, 3, {2: 1000}),
    # the file of the third split is named 3imgs_class.txt, and has five images a class
    "msn_5shot": PublishedList(MSN, 3, {5: 1000}),
}


def check_published(
    lists: Mapping[str, Sequence[Sequence[int]]], files: Mapping[str, Sequence[str]], labels: np.ndarray
) -> None:
    """Compare lists that have the name of a published one with the numbers of that one. Other names are free.

    Args:
        lists: name → the ids of the images of each file.
        files: name → the files.
        labels: (N,) class index of each image.

    Raises:
        LgpError: the number of files, of images, of classes, or of images of a class is another; or a subset is not
            inside the one that contains it, where both are given. The message has what was given and what is expected.
    """
    for name in lists.keys() & PUBLISHED.keys():
        published = PUBLISHED[name]
        if len(lists[name]) != published.splits:
            raise LgpError(
                f"labels.lists {name} names {len(lists[name])} file(s), but {published.origin} has {published.splits} "
                f"of it: name {published.splits}, or call the list otherwise"
            )
        for file, ids in zip(files[name], lists[name], strict=True):
            found = Counter(Counter(labels[ids].tolist()).values())
            if found != published.classes:
                raise LgpError(
                    f"{file} has {_described(found)}; {name} of {published.origin} has "
                    f"{_described(published.classes)}: take the published file, or call the list otherwise"
                )
        if published.inside and published.inside in lists:
            missing = set(lists[name][0]) - set(lists[published.inside][0])
            if missing:
                raise LgpError(
                    f"{len(missing):,} images of {name} are not in {published.inside}, but {published.origin} has all "
                    "there: take both published files, or call the lists otherwise"
                )


def _described(classes: Mapping[int, int]) -> str:
    """Describe the numbers of a list: 12,811 images of 1,000 classes (189 × 12 + 811 × 13)."""
    images = sum(of_class * number for of_class, number in classes.items())
    each = " + ".join(f"{number:,} × {of_class:,}" for of_class, number in sorted(classes.items()))
    return f"{images:,} images of {sum(classes.values()):,} classes ({each})"
