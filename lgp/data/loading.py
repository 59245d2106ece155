"""Batches of crops as a pure function of the step, read by worker processes where asked."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lgp.data.prepared import Prepared
from lgp.data.views import flip, random_boxes
from lgp.params import ViewParams
from lgp.randomness import generator


class StepCrops(Dataset[Tensor]):
    """Item s is the batch of step s: (B, V, C, S, S) uint8 crops, nothing but the seed and s deciding.

    An epoch is a random order of the pre-training images without its incomplete last batch, so every
    batch is full (as MAE and MoCo v3 drop it).
    """

    def __init__(self, data: Prepared, params: ViewParams, views: int, batch_size: int, seed: int, name: str) -> None:
        """Batches for the stage `name`, which keeps its draws apart from other stages'."""
        self.data, self.params, self.views = data, params, views
        self.batch_size, self.seed, self.name = batch_size, seed, name
        self.steps_per_epoch = len(data.pretraining_ids) // batch_size
        self._latest_order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest_order[0] != epoch:
            ids = self.data.pretraining_ids
            order = torch.randperm(len(ids), generator=generator(self.seed, f"{self.name}/order", epoch))
            self._latest_order = (epoch, ids[order.numpy()])
        return self._latest_order[1]

    def ids(self, step: int) -> np.ndarray:
        """Return the image ids of a step's batch, (B,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def __getitem__(self, step: int) -> Tensor:
        """Return the crops of step `step`."""
        ids = self.ids(step)
        rng = generator(self.seed, f"{self.name}/crops", step)
        boxes = random_boxes(torch.from_numpy(self.data.sizes[ids]), self.views, self.params.crop_scale_min, rng)
        return flip(self.data.crops(ids, boxes), self.params.flip_p, rng)


def loader(crops: StepCrops, first: int, last: int, workers: int, pin: bool) -> DataLoader[Tensor]:
    """Iterate over the batches of steps [first, last), the same with any number of workers."""
    return DataLoader(crops, sampler=range(first, last), batch_size=None, num_workers=workers, pin_memory=pin)
