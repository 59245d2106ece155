"""Online measures of the features during pre-training: accuracy by k-NN, effective rank, and what a caller adds.

It reads labels of `train` and `val`. It does not affect the training: an encoder is the same with and without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from lgp.compute.launch import launched_rank
from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.features.extraction import ALONE, Encode, Running, extract, features_of
from lgp.features.knn import TEMPERATURE, K, knn_predict
from lgp.features.rank import effective_rank
from lgp.params.run import OnlineKnnParams
from lgp.training.alarms import KNN, RANK


def labels_if_any(images: Path, labels: Path) -> LabelledImages | None:
    """Open images with their labels. None where there are no labels of these images yet, or nothing to compare."""
    try:
        data = LabelledImages(images, labels)
        data.check_evaluable()
        if not len(data.ids("train")):
            raise LgpError("no training image has a label: `lgp labels add FILE` adds labels")
        return data
    except LgpError as e:
        if launched_rank() == 0:
            print(f"online k-NN is off: {e}", flush=True)
        return None


@dataclass(frozen=True)
class Seen:
    """What is measured while an encoder learns.

    Attributes:
        of: ids of images → their features (N, D).
        train: features of the labelled images that vote, (N, D).
        val: features of the images whose labels are predicted, (M, D).
        val_ids: the ids of these.
    """

    of: Callable[[np.ndarray], np.ndarray]
    train: np.ndarray
    val: np.ndarray
    val_ids: np.ndarray


Measure = Callable[[Seen], dict[str, float]]


def nothing_more(_: Seen) -> dict[str, float]:
    """Measure nothing."""
    return {}


@dataclass(frozen=True)
class OnlineKnn:
    """Weighted k-NN of some validation images among some labelled training images.

    Attributes:
        data: the images and their labels.
        settings: how often, and of how many images. Sources list their images class by class, so they are taken at
            even steps of `train` and `val`.
        running: how features are computed.
        more: what is measured besides.
    """

    data: LabelledImages
    settings: OnlineKnnParams
    running: Running = ALONE
    more: Measure = nothing_more

    def after_epoch(self, epoch: int, encoder: VisionTransformer, device: torch.device) -> dict[str, float]:
        """Return `val/online_knn_top1` in percent, `val/effective_rank` and more every `every_epochs` epochs, else {}.

        The encoder is in evaluation mode afterwards.
        """
        every = self.settings.every_epochs
        if not every or epoch % every:
            return {}
        seen = self._see(features_of(encoder, device))
        return {KNN: self._top1(seen), RANK: float(f"{effective_rank(seen.val):.4g}"), **self.more(seen)}

    def top1(self, encode: Encode) -> float:
        """Return the accuracy of some features, in percent."""
        return self._top1(self._see(encode))

    def _see(self, encode: Encode) -> Seen:
        def of(ids: np.ndarray) -> np.ndarray:
            return extract(encode, self.data, ids, running=self.running)

        return Seen(of, of(self.train), of(self.val), self.val)

    def _top1(self, seen: Seen) -> float:
        labels, classes, device = self.data.labels, len(self.data.classes), self.running.device
        predicted = knn_predict(seen.train, labels[self.train], seen.val, classes, K, TEMPERATURE, device)
        return round(100 * float((predicted == labels[seen.val_ids]).mean()), 2)

    @property
    def train(self) -> np.ndarray:
        """The ids of the labelled images."""
        return _spread(self.data.ids("train"), self.settings.train_images)

    @property
    def val(self) -> np.ndarray:
        """The ids of the images whose labels are predicted."""
        return _spread(self.data.ids("val"), self.settings.val_images)


def _spread(ids: np.ndarray, most: int) -> np.ndarray:
    return ids[np.linspace(0, len(ids) - 1, min(most, len(ids))).round().astype(int)]
