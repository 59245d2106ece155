"""Batches of crops as a pure function of the step, read by worker processes where asked."""

import signal
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lgp.data.prepared import Prepared
from lgp.data.views import random_boxes, random_flips
from lgp.params import ViewParams
from lgp.randomness import generator


@dataclass(frozen=True)
class Batch:
    """Some images of a step's batch, or all of them.

    Random choices are drawn for the whole batch and then those of `rows` are taken, so they do not depend on how many
    processes share a batch.

    Attributes:
        crops: (rows, V, C, S, S) uint8.
        step: of the training, from 0.
        rows: which images of the step's batch these are.
        size: of the step's whole batch.
    """

    crops: Tensor
    step: int
    rows: slice
    size: int

    @classmethod
    def whole(cls, crops: Tensor, step: int) -> "Batch":
        """Make a step's whole batch of its crops (B, V, C, S, S)."""
        return cls(crops, step, slice(0, len(crops)), len(crops))

    def split(self, parts: int) -> list["Batch"]:
        """Cut into equal parts, which must divide the rows."""
        each = len(self.crops) // parts
        starts = [self.rows.start + i * each for i in range(parts)]
        crops = self.crops.split(each)
        return [Batch(c, self.step, slice(s, s + each), self.size) for c, s in zip(crops, starts, strict=True)]


class StepCrops(Dataset[Tensor]):
    """Item s are the crops of this process's rows of step s: (rows, V, C, S, S) uint8; only the seed and s decide.

    An epoch is a random order of the images without its incomplete last batch, so every batch is full (as MAE and
    MoCo v3 drop it).
    """

    def __init__(
        self,
        data: Prepared,
        params: ViewParams,
        views: int,
        batch_size: int,
        seed: int,
        name: str,
        ids: np.ndarray | None = None,
    ) -> None:
        """Batches of the images `ids`, all of pre-training unless given.

        `name`, of the stage, keeps its draws apart from other stages'.
        """
        self.data, self.params, self.views = data, params, views
        self.batch_size, self.seed, self.name = batch_size, seed, name
        self.ids = data.pretraining_ids if ids is None else ids
        self.rows = slice(0, batch_size)
        self.steps_per_epoch = len(self.ids) // batch_size
        self._latest_order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def share(self, rank: int, processes: int) -> None:
        """Read from now on but the rows of one of several processes, which divide the batch."""
        each = self.batch_size // processes
        self.rows = slice(rank * each, (rank + 1) * each)

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest_order[0] != epoch:
            order = torch.randperm(len(self.ids), generator=generator(self.seed, f"{self.name}/order", epoch))
            self._latest_order = (epoch, self.ids[order.numpy()])
        return self._latest_order[1]

    def ids_of(self, step: int) -> np.ndarray:
        """Return the image ids of a step's whole batch, (B,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def __getitem__(self, step: int) -> Tensor:
        """Return the crops of step `step`."""
        ids = self.ids_of(step)
        rng = generator(self.seed, f"{self.name}/crops", step)
        boxes = random_boxes(torch.from_numpy(self.data.sizes[ids]), self.views, self.params.crop_scale_min, rng)
        flipped = random_flips(len(ids), self.views, self.params.flip_p, rng)[self.rows]
        crops = self.data.crops(ids[self.rows], boxes[self.rows])
        crops[flipped] = crops[flipped].flip(-1)
        return crops

    def batch(self, step: int, crops: Tensor) -> Batch:
        """Say what the crops of a step are."""
        return Batch(crops, step, self.rows, self.batch_size)


def loader(crops: StepCrops, first: int, last: int, workers: int, pin: bool) -> DataLoader[Tensor]:
    """Iterate over the crops of steps [first, last), the same with any number of workers."""
    # forked, so that they share the images that are kept decoded
    context = "fork" if workers else None
    return DataLoader(
        crops,
        sampler=range(first, last),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context=context,
        worker_init_fn=_leave_signals,
    )


def _leave_signals(_: int) -> None:
    """Leave a Ctrl-C, and a SIGTERM that all processes get, to the training process, which then ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
