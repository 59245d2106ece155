"""Batches as a function of the step."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import merged
from made_sources import folder
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from lgp.compute.randomness import Stream, generator
from lgp.data import loading, stored, writing
from lgp.data.loading import (
    AHEAD,
    PART_BYTES,
    Batch,
    CropDataset,
    MultiCropDataset,
    _leave_signals,
    loader,
    part_loader,
    read_batches,
    sliced,
)
from lgp.data.preparation import prepare
from lgp.data.storage import Images
from lgp.data.stored import ARRAY
from lgp.data.views import random_boxes, random_flips
from lgp.params.data import DataParams
from lgp.params.pretrain import SmallViews, ViewParams

CPU = torch.device("cpu")
VIEWS = ViewParams(crop_scale_min=0.4, flip_p=0.5)


def crops(prepared: Images, batch_size: int = 64, seed: int = 0) -> CropDataset:
    return CropDataset(prepared, VIEWS, 2, batch_size, Stream(seed, "cl"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_workers_give_the_same_batches(prepared: Images) -> None:
    alone = list(loader(crops(prepared), 2, 7, 0, CPU))
    helped = list(loader(crops(prepared), 2, 7, 2, CPU))
    assert len(alone) == 5
    assert alone[0].shape == (64, 2, 1, 8, 8)
    assert alone[0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("of", [CropDataset, MultiCropDataset], ids=["large", "small"])
def test_parts_of_any_size_and_any_number_of_workers_give_the_same_batches(
    of: type[CropDataset], photographs: Images
) -> None:
    """Also on the second process of two, for images of several sizes."""

    def second() -> CropDataset:
        small = [SmallViews(count=3, size=4)] if of is MultiCropDataset else []
        made = of(photographs, VIEWS, 2, 8, Stream(0, "cl"), *small)
        made.shard(1, 2)
        return made

    alone = list(loader(second(), 0, 3, 0, CPU))
    row = second().row_bytes
    assert alone[0].numel() == 4 * row
    for workers, part_bytes in ((1, 1), (2, row), (1, 3 * row), (2, PART_BYTES)):
        helped = list(loader(second(), 0, 3, workers, CPU, part_bytes))
        assert len(helped) == len(alone) == 3
        assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True)), (workers, part_bytes)


def test_workers_read_parts_and_this_process_whole_batches(prepared: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[range, list[slice], int]] = []

    def noted(_read: Any, steps: range, parts_of: Any, workers: int, pin: bool) -> list[Tensor]:
        assert not pin
        asked.append((steps, list(parts_of(steps[0])), workers))
        return [torch.zeros(1)] * 100

    monkeypatch.setattr(loading, "part_loader", noted)
    mine = crops(prepared)
    mine.shard(1, 2)
    assert mine.row_bytes == 2 * 64
    assert len(next(loader(mine, 3, 5, 0, CPU))) == 1
    assert len(next(loader(mine, 3, 5, 2, CPU, 12 * mine.row_bytes + 1))) == 3
    parts = [slice(32, 44), slice(44, 56), slice(56, 64)]
    assert asked == [(range(3, 5), [slice(32, 64)], 0), (range(3, 5), parts, 2)]
    assert sliced(slice(32, 64), 32) == [slice(32, 64)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("workers", "parts", "each"), [(0, 9, None), (2, 9, 9), (4, 9, 5), (16, 9, 2), (1, 1, 2)])
def test_what_is_read_ahead_is_two_batches_or_two_parts_of_each_worker(
    prepared: Images, workers: int, parts: int, each: int | None
) -> None:
    ahead = part_loader(crops(prepared).read, range(1), lambda _: [slice(0, 1)] * parts, workers, pin=False)
    assert AHEAD == 2
    assert ahead.prefetch_factor == each


def test_choices_of_a_step_are_drawn_once_for_all_its_parts(prepared: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = list[int](), loading.random_boxes
    monkeypatch.setattr(loading, "random_boxes", lambda sizes, *rest: drawn.append(len(sizes)) or draw(sizes, *rest))  # type: ignore[func-returns-value]
    mine = crops(prepared)
    parts = torch.cat([mine.read(2, rows) for rows in sliced(slice(0, 64), 5)])
    assert drawn == [64]
    assert torch.equal(parts, crops(prepared)[2])
    assert torch.equal(mine[3], crops(prepared)[3])


def test_an_epoch_visits_every_image_at_most_once_in_a_new_order(prepared: Images) -> None:
    batches = crops(prepared)
    per_epoch = batches.steps_per_epoch
    epochs = [np.concatenate([batches.ids_of(e * per_epoch + s) for s in range(per_epoch)]) for e in (0, 1)]
    for ids in epochs:
        assert len(np.unique(ids)) == len(ids) == per_epoch * 64
        assert np.isin(ids, prepared.pretraining_ids).all()
    assert not np.array_equal(epochs[0], epochs[1])


def test_given_ids_and_another_seed_or_name_give_other_batches(prepared: Images) -> None:
    some = prepared.pretraining_ids[::3]
    batches = CropDataset(prepared, VIEWS, 2, 8, Stream(0, "cl"), some)
    assert batches.steps_per_epoch == len(some) // 8
    assert np.isin(np.concatenate([batches.ids_of(step) for step in range(30)]), some).all()
    of_streams = [
        CropDataset(prepared, VIEWS, 2, 8, s).ids_of(0) for s in (Stream(0, "cl"), Stream(1, "cl"), Stream(0, "mim"))
    ]
    assert len({tuple(ids) for ids in of_streams}) == 3


def test_processes_share_a_batch_row_by_row(prepared: Images) -> None:
    whole = crops(prepared)[3]
    parts = []
    for rank in range(4):
        mine = crops(prepared)
        mine.shard(rank, 4)
        parts.append(mine[3])
    assert torch.equal(torch.cat(parts), whole)


def test_parts_of_a_batch_know_their_rows() -> None:
    batch = Batch(torch.arange(12).view(6, 1, 1, 1, 2), 5, slice(6, 12), 24)
    parts = batch.split(3)
    assert [part.rows for part in parts] == [slice(6, 8), slice(8, 10), slice(10, 12)]
    assert all(part.step == 5 and part.size == 24 for part in parts)
    assert torch.equal(torch.cat([part.crops for part in parts]), batch.crops)


def test_crops_of_encoded_images_equal_torchvisions(photographs: Images) -> None:
    ids = photographs.ids("train")
    boxes = random_boxes(torch.from_numpy(photographs.sizes[ids]), 2, 0.1, generator(0, "x"))
    for mode in ("bilinear", "bicubic"):
        ours = photographs.crops(ids, boxes, mode)
        for image_id, of_image, cuts in zip(ids, boxes.tolist(), ours, strict=True):
            image = tvf.pil_to_tensor(photographs.open_image(image_id))
            for box, cut in zip(of_image, cuts, strict=True):
                theirs = tvf.resized_crop(image, *box, [8, 8], tvf.InterpolationMode(mode), antialias=True)
                assert torch.equal(cut, theirs)


def test_bicubic_crops_of_an_array_equal_torchvisions(prepared: Images) -> None:
    ids = prepared.ids("train")[:40]
    boxes = random_boxes(torch.from_numpy(prepared.sizes[ids]), 1, 0.1, generator(0, "x"))
    ours = prepared.crops(ids, boxes, "bicubic")
    for image_id, box, cut in zip(ids, boxes[:, 0].tolist(), ours[:, 0], strict=True):
        image = tvf.pil_to_tensor(prepared.open_image(image_id))
        theirs = tvf.resized_crop(image, *box, [8, 8], tvf.InterpolationMode.BICUBIC, antialias=True)
        assert torch.equal(cut, theirs)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crops_are_resized_as_their_views_say(prepared: Images, mode: str) -> None:
    views = VIEWS.model_copy(update={"interpolation": mode, "flip_p": 0.0})
    batches = CropDataset(prepared, views, 1, 8, Stream(0, "cl"))
    ids = batches.ids_of(0)
    boxes = random_boxes(torch.from_numpy(prepared.sizes[ids]), 1, 0.4, Stream(0, "cl").generator("crops", 0))
    assert torch.equal(batches[0], prepared.crops(ids, boxes, mode))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_evaluation_crop_is_torchvisions_however_images_are_stored(
    tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    source = folder(tmp_path / "source", {"a": 6, "b": 6}, size=(16, 16))
    changes = {"source": str(source), "image_size": 16, "channels": 3, "eval_crop": 0.8, "max_train_images": None}
    data = DataParams.model_validate(merged(values["data"], changes))
    stored = []
    for name, limit in (("array", 2**30), ("encoded", 0)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(writing, "ARRAY_BYTES", limit)
        prepare(data, 0, tmp_path / name, tmp_path / "held_out.csv")
        stored.append(Images(tmp_path / name))
    assert [(images.folder / ARRAY).exists() for images in stored] == [True, False]
    ids = stored[0].ids("train")
    array, encoded = (images.whole(ids, mode) for images in stored)
    resized = [tvf.resize(stored[0].open_image(i), [20], tvf.InterpolationMode(mode), antialias=True) for i in ids]
    theirs = torch.stack([tvf.pil_to_tensor(tvf.center_crop(image, [16, 16])) for image in resized])
    assert torch.equal(array, theirs)
    assert torch.equal(encoded, theirs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_small_data_is_decoded_once_and_shared_by_workers(photographs: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = CropDataset(photographs, VIEWS, 2, 4, Stream(0, "cl"))
    total = 2 * batches.steps_per_epoch
    anew = list(loader(batches, 0, total, 0, CPU))
    photographs.keep_decoded(1)  # too little for them
    decoded: list[bytes] = []
    decode = stored.decode
    monkeypatch.setattr(stored, "decode", lambda data, channels: decoded.append(data) or decode(data, channels))
    list(loader(batches, 0, total, 0, CPU))
    assert len(decoded) == 4 * total
    photographs.keep_decoded(1e6)
    decoded.clear()
    assert all(torch.equal(a, b) for a, b in zip(anew, loader(batches, 0, total, 0, CPU), strict=True))
    assert sorted(decoded) == sorted(set(decoded))
    decoded.clear()
    photographs.keep_decoded(1e6)
    assert all(torch.equal(a, b) for a, b in zip(anew, loader(batches, 0, total, 2, CPU), strict=True))
    list(loader(batches, 0, total, 0, CPU))
    assert not decoded  # here: the workers have filled the memory that is shared with them


def test_order_of_an_epoch_does_not_depend_on_what_was_read_before(prepared: Images) -> None:
    whole, per_epoch = crops(prepared), crops(prepared).steps_per_epoch
    in_a_row = [whole.ids_of(step).tolist() for step in range(3 * per_epoch)]
    for step in (2 * per_epoch, per_epoch, 1, per_epoch + 1):
        assert crops(prepared).ids_of(step).tolist() == in_a_row[step]
        assert whole.ids_of(step).tolist() == in_a_row[step]


class AskedOfSignals(CropDataset):
    def read(self, step: int, rows: slice) -> Tensor:
        return torch.tensor([signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGINT, signal.SIGTERM)])


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_leave_signals_to_the_training_process(prepared: Images) -> None:
    asked = AskedOfSignals(prepared, VIEWS, 1, 8, Stream(0, "cl"))
    (answer,) = loader(asked, 0, 1, 1, CPU)
    assert answer.tolist() == [True, True]


def test_whole_batch_has_all_rows_and_a_shard_its_own(prepared: Images) -> None:
    batches = crops(prepared)
    batch = Batch.whole(batches[2], 2)
    assert (batch.step, batch.rows, batch.size) == (2, slice(0, 64), 64)
    batches.shard(1, 4)
    shard = batches.batch(2, batches[2])
    assert (shard.step, shard.rows, shard.size) == (2, slice(16, 32), 64)
    assert torch.equal(shard.crops, batch.crops[16:32])


def test_flips_mirror_the_views_that_are_drawn_and_no_others(prepared: Images) -> None:
    def with_flips(flip_p: float) -> Tensor:
        views = VIEWS.model_copy(update={"flip_p": flip_p})
        return CropDataset(prepared, views, 2, 64, Stream(0, "cl"))[1]

    straight, half = with_flips(0.0), with_flips(0.5)
    rng = Stream(0, "cl").generator("crops", 1)
    random_boxes(torch.ones(64, 2).long(), 2, 0.4, rng)  # drawn before
    flipped = random_flips(64, 2, 0.5, rng)
    assert torch.equal(half[flipped], straight[flipped].flip(-1))
    assert torch.equal(half[~flipped], straight[~flipped])


def test_unshared_rows_are_all_of_the_batch_and_the_order_is_of_the_stream(prepared: Images) -> None:
    batches = crops(prepared)
    assert batches.rows == slice(0, 64)
    order = torch.randperm(len(batches.ids), generator=Stream(0, "cl").generator("order", 1)).numpy()
    assert batches.ids_of(batches.steps_per_epoch).tolist() == batches.ids[order[:64]].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_loader_forks_its_workers_and_pins_where_asked(prepared: Images) -> None:
    read, whole = crops(prepared).read, [slice(0, 64)]
    helped, alone = (part_loader(read, range(1), lambda _: whole, n, pin=pin) for n, pin in ((1, True), (0, False)))
    assert helped.multiprocessing_context.get_start_method() == "fork"  # type: ignore[union-attr]
    assert alone.multiprocessing_context is None
    assert (helped.pin_memory, alone.pin_memory) == (True, False)


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_move_to_the_device_without_waiting(
    prepared: Images, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crops:
        def to(self, device: torch.device, *, non_blocking: bool) -> Tensor:
            asked.append((device, non_blocking))
            return torch.ones(2)

    def loaded(*_: Any, pin: bool) -> list[Crops]:
        assert pin
        return [Crops() for _ in range(2 * parts)]

    asked: list[Any] = []
    card = torch.device("cuda", 0)
    monkeypatch.setattr(loading, "part_loader", loaded)
    made = list(read_batches(prepared, crops(prepared).read, range(2), lambda _: [slice(0, 1)] * parts, 0, card))
    assert asked == [(card, True)] * 2 * parts
    assert [len(batch) for batch in made] == [2 * parts] * 2


def test_signals_are_ignored_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, object]] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: asked.append((number, handler)))
    _leave_signals(0)
    assert dict(asked) == dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), signal.SIG_IGN)


def test_workers_find_everything_open(photographs: Images) -> None:
    """What a worker opened itself would lie in memory once per worker."""
    batches = CropDataset(photographs, VIEWS, 2, 4, Stream(0, "cl"))
    next(iter(loader(batches, 0, 1, 1, CPU)))
    assert {"sizes", "_files", "_rows", "_shards"} <= vars(photographs).keys()
