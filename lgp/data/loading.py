"""Batches of crops as a pure function of the step. Worker processes can read them."""

import math
import signal
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lgp.compute.interruption import ASKING
from lgp.compute.randomness import Stream
from lgp.data.storage import Images
from lgp.data.views import random_boxes, random_flips
from lgp.params.pretrain import ContrastiveParams, SmallViews, ViewParams


@dataclass(frozen=True)
class Batch:
    """Some images of a step's batch, or all of them.

    Random choices are drawn for the whole batch. Those of `rows` are then taken. They therefore do not depend on the
    number of processes.

    Attributes:
        crops: (rows, V, C, S, S) uint8.
        step: of the training, from 0.
        rows: the places of these images in the step's batch.
        size: number of images of the step's whole batch.
        small: (rows, n, C, s, s) uint8, smaller crops of the same images, where there are some.
    """

    crops: Tensor
    step: int
    rows: slice
    size: int
    small: Tensor | None = None

    @classmethod
    def whole(cls, crops: Tensor, step: int) -> "Batch":
        """Return a step's whole batch, from its crops (B, V, C, S, S)."""
        return cls(crops, step, slice(0, len(crops)), len(crops))

    def split(self, parts: int) -> list["Batch"]:
        """Cut into equal parts, without small crops. Their number must divide the number of rows."""
        each = len(self.crops) // parts
        starts = [self.rows.start + i * each for i in range(parts)]
        crops = self.crops.split(each)
        return [Batch(c, self.step, slice(s, s + each), self.size) for c, s in zip(crops, starts, strict=True)]


class CropDataset(Dataset[Tensor]):
    """The crops of each step: item s holds this process's rows of step s, (rows, V, C, S, S) uint8.

    Item s is a pure function of the stream and s.

    An epoch is a random order of the images. Its incomplete last batch is dropped, as in MAE and MoCo v3. All batches
    are full.
    """

    def __init__(
        self,
        data: Images,
        params: ViewParams,
        views: int,
        batch_size: int,
        stream: Stream,
        ids: np.ndarray | None = None,
    ) -> None:
        """Make batches of the images `ids`. Without `ids`, they are all images of pre-training.

        Args:
            data: prepared images.
            params: crops and flips.
            views: V, crops of each image.
            batch_size: of all processes together.
            stream: of the training.
            ids: (N,) images of an epoch.
        """
        self.data, self.params, self.views = data, params, views
        self.batch_size, self.stream = batch_size, stream
        self.ids = data.pretraining_ids if ids is None else ids
        self.rows = slice(0, batch_size)
        self.steps_per_epoch = len(self.ids) // batch_size
        self._latest_order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def shard(self, rank: int, processes: int) -> None:
        """Read only the rows of process `rank` from now on. The number of processes must divide the batch size."""
        each = self.batch_size // processes
        self.rows = slice(rank * each, (rank + 1) * each)

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest_order[0] != epoch:
            order = torch.randperm(len(self.ids), generator=self.stream.generator("order", epoch))
            self._latest_order = (epoch, self.ids[order.numpy()])
        return self._latest_order[1]

    def ids_of(self, step: int) -> np.ndarray:
        """Return the image ids of a step's whole batch, (B,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def __getitem__(self, step: int) -> Tensor:
        """Return the crops of step `step`."""
        boxes, flipped = self._draw(step, "crops", self.params, self.views)
        return _flip(self.data.crops(self.ids_of(step)[self.rows], boxes, self.params.interpolation), flipped)

    def _draw(self, step: int, name: str, params: ViewParams, views: int) -> tuple[Tensor, Tensor]:
        """Draw the boxes of this process's rows, (rows, views, 4), and which views are mirrored, (rows, views)."""
        ids, rng = self.ids_of(step), self.stream.generator(name, step)
        sizes = torch.from_numpy(self.data.sizes[ids])
        boxes = random_boxes(sizes, views, params.crop_scale_min, rng, params.crop_scale_max)
        return boxes[self.rows], random_flips(len(ids), views, params.flip_p, rng)[self.rows]

    def batch(self, step: int, crops: Tensor) -> Batch:
        """Return the crops of a step as a `Batch`."""
        return Batch(crops, step, self.rows, self.batch_size)


class MultiCropDataset(CropDataset):
    """The large crops of each step, and small crops of the same images (multi-crop).

    Item s holds the bytes of both in one tensor, (rows, bytes) uint8, so that they travel together. `batch` parts them.
    The large crops are those of a `CropDataset`.
    """

    def __init__(
        self, data: Images, params: ViewParams, views: int, batch_size: int, stream: Stream, small: SmallViews
    ) -> None:
        """Make batches of all images of pre-training. `small` describes the small crops."""
        super().__init__(data, params, views, batch_size, stream)
        self.small, self.small_params = small, small.beside(params)

    def __getitem__(self, step: int) -> Tensor:
        """Return the crops of step `step`, flat."""
        boxes, flipped = self._draw(step, "crops", self.params, self.views)
        small_boxes, small_flipped = self._draw(step, "small crops", self.small_params, self.small.count)
        wanted = [(boxes, self.data.image_size), (small_boxes, self.small.size)]
        large, small = self.data.crops_of_sizes(self.ids_of(step)[self.rows], wanted, self.params.interpolation)
        return torch.cat([_flip(large, flipped).flatten(1), _flip(small, small_flipped).flatten(1)], dim=1)

    def batch(self, step: int, crops: Tensor) -> Batch:
        """Return the crops of a step as a `Batch`."""
        channels, size, small = self.data.channels, self.data.image_size, self.small.size
        shapes = (self.views, channels, size, size), (self.small.count, channels, small, small)
        large, rest = crops.split([math.prod(shape) for shape in shapes], dim=1)
        return Batch(large.unflatten(1, shapes[0]), step, self.rows, self.batch_size, rest.unflatten(1, shapes[1]))


def contrastive_crops(data: Images, params: ContrastiveParams, batch_size: int, stream: Stream) -> CropDataset:
    """Return the batches of a contrastive training: two large crops of each image, and small ones where asked for."""
    if params.small_views is None:
        return CropDataset(data, params.views, 2, batch_size, stream)
    return MultiCropDataset(data, params.views, 2, batch_size, stream, params.small_views)


def _flip(crops: Tensor, flipped: Tensor) -> Tensor:
    crops[flipped] = crops[flipped].flip(-1)
    return crops


def loader(crops: CropDataset, first: int, last: int, workers: int, pin: bool) -> DataLoader[Tensor]:
    """Iterate over the crops of steps [first, last). They are the same with any number of workers."""
    # forked workers share the decoded images and the index in memory
    context = "fork" if workers else None
    if workers:
        crops.data.open_all()
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
    """Ignore Ctrl-C, SIGTERM and SIGHUP in a worker. The training process gets them too, and ends the workers."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
