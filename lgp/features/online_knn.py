"""Online k-NN: accuracy, and effective rank, of the features during pre-training.

It reads labels of `train` and `val`. It does not affect the training: an encoder is the same with and without it.
"""

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
class OnlineKnn:
    """Weighted k-NN of some validation images among some labelled training images.

    Attributes:
        data: the images and their labels.
        settings: how often, and of how many images. Sources list their images class by class, so they are taken at
            even steps of `train` and `val`.
        running: how features are computed.
    """

    data: LabelledImages
    settings: OnlineKnnParams
    running: Running = ALONE

    def after_epoch(self, epoch: int, encoder: VisionTransformer, device: torch.device) -> dict[str, float]:
        """Return `val/online_knn_top1` in percent and `val/effective_rank` every `every_epochs` epochs, else {}.

        The encoder is in evaluation mode afterwards.
        """
        every = self.settings.every_epochs
        if not every or epoch % every:
            return {}
        top1, val = self.measured(features_of(encoder, device))
        return {KNN: top1, RANK: float(f"{effective_rank(val):.4g}")}

    def measured(self, encode: Encode) -> tuple[float, np.ndarray]:
        """Return the accuracy of some features in percent, and those of the validation images (N, D)."""
        train, val = (extract(encode, self.data, ids, running=self.running) for ids in (self.train, self.val))
        labels, classes, device = self.data.labels, len(self.data.classes), self.running.device
        predicted = knn_predict(train, labels[self.train], val, classes, K, TEMPERATURE, device)
        return round(100 * float((predicted == labels[self.val]).mean()), 2), val

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
