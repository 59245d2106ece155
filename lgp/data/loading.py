"""Batches of crops as a pure function of the step. Worker processes can read them."""

import itertools
import math
import signal
from collections.abc import Callable, Iterator, Sequence
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

PART_BYTES = 8 * 2**20  # what a worker reads and sends at once; images of 3 × 224 × 224: 55
AHEAD = 2  # batches that workers read ahead, at least: the next is whole when a step ends


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
        """Cut into equal parts. Their number must divide the number of rows."""
        each = len(self.crops) // parts
        starts = [self.rows.start + i * each for i in range(parts)]
        crops = self.crops.split(each)
        small = [None] * parts if self.small is None else self.small.split(each)
        return [
            Batch(of_part, self.step, slice(start, start + each), self.size, of_small)
            for of_part, start, of_small in zip(crops, starts, small, strict=True)
        ]


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
        self._latest_draws: dict[str, tuple[int, tuple[Tensor, Tensor]]] = {}

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
        return self.read(step, self.rows)

    def read(self, step: int, rows: slice) -> Tensor:
        """Return the crops of some rows of a step's whole batch. They are the same whatever is read beside them."""
        boxes, flipped = self._draw(step, rows, "crops", self.params, self.views)
        return _flip(self.data.crops(self.ids_of(step)[rows], boxes, self.params.interpolation), flipped)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of the crops."""
        return self.views * self.data.channels * self.data.image_size**2

    def parts(self, most_bytes: int) -> list[slice]:
        """Cut this process's rows into parts of at most so many bytes, or of one row where that has more."""
        return sliced(self.rows, max(most_bytes // self.row_bytes, 1))

    def _draw(self, step: int, rows: slice, name: str, params: ViewParams, views: int) -> tuple[Tensor, Tensor]:
        """Draw the boxes of some rows, (rows, views, 4), and which views are mirrored, (rows, views)."""
        if self._latest_draws.get(name, (-1,))[0] != step:
            ids, rng = self.ids_of(step), self.stream.generator(name, step)
            sizes = torch.from_numpy(self.data.sizes[ids])
            boxes = random_boxes(sizes, views, params.crop_scale_min, rng, params.crop_scale_max)
            # for the whole batch, of which a worker reads several parts
            self._latest_draws[name] = step, (boxes, random_flips(len(ids), views, params.flip_p, rng))
        boxes, flipped = self._latest_draws[name][1]
        return boxes[rows], flipped[rows]

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

    def read(self, step: int, rows: slice) -> Tensor:
        """Return the crops of some rows of a step's whole batch, flat."""
        boxes, flipped = self._draw(step, rows, "crops", self.params, self.views)
        small_boxes, small_flipped = self._draw(step, rows, "small crops", self.small_params, self.small.count)
        wanted = [(boxes, self.data.image_size), (small_boxes, self.small.size)]
        large, small = self.data.crops_of_sizes(self.ids_of(step)[rows], wanted, self.params.interpolation)
        return torch.cat([_flip(large, flipped).flatten(1), _flip(small, small_flipped).flatten(1)], dim=1)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, with its small crops."""
        return super().row_bytes + self.small.count * self.data.channels * self.small.size**2

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


def sliced(rows: slice, most: int) -> list[slice]:
    """Cut rows into parts of `most` rows. The last one may have fewer."""
    return [slice(start, min(start + most, rows.stop)) for start in range(rows.start, rows.stop, most)]


def _flip(crops: Tensor, flipped: Tensor) -> Tensor:
    crops[flipped] = crops[flipped].flip(-1)
    return crops


def loader(
    crops: CropDataset, first: int, last: int, workers: int, device: torch.device, part_bytes: int = PART_BYTES
) -> Iterator[Tensor]:
    """Yield the crops of each of the steps [first, last) on a device. They are the same with any number of workers.

    Args:
        crops: of the training.
        first: the first step.
        last: the step after the last one.
        workers: processes that read; 0: this one.
        device: where the crops go.
        part_bytes: what a worker reads at once, if it is not less than one row.
    """
    parts = crops.parts(part_bytes) if workers else [crops.rows]
    return read_batches(crops.data, crops.read, range(first, last), lambda _: parts, workers, device)


def read_batches(
    images: Images,
    read: Callable[[int, slice], Tensor],
    steps: range,
    parts_of: Callable[[int], Sequence[slice]],
    workers: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield a batch for each step on a device, in order. Workers read its parts, ahead of what is asked for.

    All workers share the work of each batch, and what is read ahead takes the memory of few batches: `AHEAD` of them,
    or two parts for each worker, where that is more. Whole batches would take that of two for each worker.

    Args:
        images: that are read.
        read: returns the rows of a step.
        steps: whose batches are yielded.
        parts_of: the rows of a step that are read at once.
        workers: processes that read; 0: this one.
        device: where a batch goes. For a GPU its parts lie in pinned memory.
    """
    if workers:
        images.open_all()
    parts = iter(part_loader(read, steps, parts_of, workers, pin=device.type == "cuda"))
    for step in steps:
        of_batch = [p.to(device, non_blocking=True) for p in itertools.islice(parts, len(parts_of(step)))]
        yield torch.cat(of_batch) if len(of_batch) > 1 else of_batch[0]


def part_loader(
    read: Callable[[int, slice], Tensor],
    steps: range,
    parts_of: Callable[[int], Sequence[slice]],
    workers: int,
    pin: bool,
) -> DataLoader[Tensor]:
    """Iterate over the parts of the batches of all steps, in order."""
    return DataLoader(
        _Parts(read),
        sampler=_Places(steps, parts_of),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(2, math.ceil(AHEAD * len(parts_of(steps.start)) / workers)) if workers else None,
        pin_memory=pin,
        # forked workers share the decoded images and the index in memory
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # torch draws a seed for workers, and would draw it from the global generator
    )


@dataclass(frozen=True)
class _Parts(Dataset[Tensor]):
    """What a function reads of a step and some of its rows."""

    read: Callable[[int, slice], Tensor]

    def __getitem__(self, place: tuple[int, slice]) -> Tensor:
        return self.read(*place)


@dataclass(frozen=True)
class _Places:
    """All parts of all steps, in order, without a list of them."""

    steps: range
    parts_of: Callable[[int], Sequence[slice]]

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        return ((step, rows) for step in self.steps for rows in self.parts_of(step))


def _leave_signals(_: int) -> None:
    """Ignore Ctrl-C, SIGTERM and SIGHUP in a worker. The training process gets them too, and ends the workers."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
