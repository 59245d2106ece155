"""Online ridge regression: accuracy with few labels of the features during pre-training.

It is in closed form. Logistic regression would take many passes over the features at every point of the curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lgp.data.labels import LabelledImages
from lgp.evaluate.few_labels import SCALINGS, Images, fit_few_labels
from lgp.features.online_knn import Seen
from lgp.params.evaluate import FewShotParams
from lgp.params.labels import ALL_LABELS

RIDGE = "val/online_ridge_top1"


@dataclass(frozen=True)
class OnlineRidge:
    """Ridge regression with few labels.

    Attributes:
        data: the images and their labels.
        subsets: of few labels, each of two classes or more. The accuracy is the mean over them.
        params: the section `fewshot`. Its scaling is measured on the images that vote in the online k-NN. C is chosen
            by cross-validation, also where the section says otherwise. With a single image of a class it is `c_fixed`.
        device: where to compute.
    """

    data: LabelledImages
    subsets: Sequence[np.ndarray]
    params: FewShotParams
    device: torch.device | None = None

    def __call__(self, seen: Seen) -> dict[str, float]:
        """Return `val/online_ridge_top1` in percent; nothing for features that are not finite."""
        scale = SCALINGS[self.params.scaling](seen.train)
        ids, labels = np.unique(np.concatenate(self.subsets)), self.data.labels
        x, val = scale(seen.of(ids)), scale(seen.val)
        if not (np.isfinite(x).all() and np.isfinite(val).all()):
            return {}  # the loss of the next step, or the checks at the end, say so
        labelled = [Images(x[np.searchsorted(ids, of)], labels[of]) for of in self.subsets]
        params = self.params.model_copy(update={"method": "ridge", "choose": "cross_validation"})
        fitted = fit_few_labels(labelled, None, len(self.data.classes), params, self.device)
        right = [(of.head.logits(val).argmax(axis=1) == labels[seen.val_ids]).mean() for of in fitted]
        return {RIDGE: round(100 * float(np.mean(right)), 2)}


def fewest_labels(data: LabelledImages, names: Sequence[str], most: int) -> list[np.ndarray]:
    """Return subsets of the fewest labels among some names; none where they cannot be classified.

    Args:
        data: the images and their labels.
        names: of few labels. `all` is left out, and so are names that `lgp labels` has not drawn yet.
        most: images of all subsets together. The first subset is taken in any case.
    """
    # `names_of_same_subsets` of a name that is not drawn is empty
    drawn = [name for name in names if name != ALL_LABELS and data.names_of_same_subsets(name)]
    there = [data.subsets(name) for name in drawn]
    fewest = min(there, key=lambda subsets: len(subsets[0]), default=[])
    fewest = fewest[: max(most // len(fewest[0]), 1)] if fewest else []
    return fewest if all(len(np.unique(data.labels[ids])) > 1 for ids in fewest) else []
