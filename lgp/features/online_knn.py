"""Online k-NN: accuracy, and effective rank, of the features during pre-training.

It reads labels of `train` and `val`. It does not affect the training: an encoder is the same with and without it.
"""

from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from lgp.compute.launch import launched_rank
from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.features.extraction import extract, features_of
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


class OnlineKnn:
    """Weighted k-NN of some validation images among some labelled training images, every `every_epochs` epochs."""

    def __init__(
        self, encoder: VisionTransformer, data: LabelledImages, device: torch.device, settings: OnlineKnnParams
    ) -> None:
        """Measure `encoder` on images at even steps of `train` and `val`. Sources list their images class by class."""
        self.encoder, self.data, self.device, self.every_epochs = encoder, data, device, settings.every_epochs
        self.train = _spread(data.ids("train"), settings.train_images)
        self.val = _spread(data.ids("val"), settings.val_images)

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Return `val/online_knn_top1` in percent and `val/effective_rank` every `every_epochs` epochs, else {}.

        The model is in evaluation mode afterwards.
        """
        if not self.every_epochs or epoch % self.every_epochs:
            return {}
        encode = features_of(self.encoder, self.device)
        train, val = (extract(encode, self.data, ids) for ids in (self.train, self.val))
        labels, classes = self.data.labels, len(self.data.classes)
        predicted = knn_predict(train, labels[self.train], val, classes, K, TEMPERATURE)
        top1 = round(100 * float((predicted == labels[self.val]).mean()), 2)
        return {KNN: top1, RANK: float(f"{effective_rank(val):.4g}")}


def _spread(ids: np.ndarray, most: int) -> np.ndarray:
    return ids[np.linspace(0, len(ids) - 1, min(most, len(ids))).round().astype(int)]
