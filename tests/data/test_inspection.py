"""What a source has is counted, what its images are is measured, and what to set follows from both."""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from lgp.data.advice import advise, batch_size, suggest_few_labels, suggest_settings
from lgp.data.contact_sheet import COLUMNS, IMAGES, LINE, MARGIN, TILE, contact_sheet
from lgp.data.inspection import ALONE, Inspection, even, inspect
from lgp.data.sources.folder import folder_source
from lgp.data.sources.offers import Offers, Read, Skipped
from lgp.params.data import DataParams
from lgp.params.file import Params

RNG = np.random.default_rng(0)


def encoded(pixels: np.ndarray | Image.Image, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(buffer, kind)
    return buffer.getvalue()


def noise(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def given(data: bytes | np.ndarray) -> bytes | np.ndarray:
    return data


def refused() -> bytes:
    raise PermissionError(13, "Permission denied")


def offers_of(
    images: Sequence[Any],
    labels: Sequence[str | None] | None = None,
    splits: str | Sequence[str] = "train",
    **more: Any,
) -> Offers:
    """Offer images that are in memory, or a `Read`."""

    def reads(positions: Sequence[int]) -> Iterator[Read]:
        assert list(positions) == sorted(positions)
        return (images[i] if callable(images[i]) else partial(given, images[i]) for i in positions)

    number = len(images)
    labels = [None] * number if labels is None else list(labels)
    return Offers(
        paths=[f"{i}.png" for i in range(number)],
        splits=[splits] * number if isinstance(splits, str) else list(splits),
        labels=list(labels),
        groups=more.get("groups", [None] * number),
        states=[""] * number,
        classes=sorted({label for label in labels if label is not None}),
        reads=reads,
        skipped=more.get("skipped", []),
        clutter=more.get("clutter", []),
    )


@pytest.fixture
def data(params: Params) -> DataParams:
    return params.data


def inspected(data: DataParams, *args: Any, **more: Any) -> Inspection:
    return inspect(offers_of(*args, **more), data)


def labelled(data: DataParams, counts: Sequence[int]) -> Inspection:
    """Inspect tiny images of which so many have each class."""
    labels = [f"class {c}" for c, count in enumerate(counts) for _ in range(count)]
    return inspect(offers_of([encoded(noise())] * len(labels), labels), data, sample=1)


def test_images_and_what_was_left_out_are_all_that_was_found(data: DataParams, tmp_path: Path) -> None:
    for name in ("ant/0.png", "ant/1.png", "bee/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(noise()))
    (tmp_path / "readme.txt").write_text("not an image")
    (tmp_path / "ant" / "lost.png").symlink_to("nowhere")
    found = inspect(folder_source(tmp_path), data)
    assert found.offered == "5 files and rows: 3 images, 1 skipped, 1 of no image by their names"
    assert found.classes == {"ant": 2, "bee": 1}
    assert found.skipped == [Skipped("ant/lost.png", "a link to nothing")]


def test_parts_are_those_that_prepare_makes(data: DataParams) -> None:
    images = [encoded(noise())] * 22
    found = inspected(data, images, [*"ab" * 10, None, None])
    assert found.splits == {"train": 22, "val": 0, "test": 0}
    assert found.parts == {"train": 2 + 14, "val": 2, "test": 4}
    assert found.train_labels == {"a": 7, "b": 7}
    assert found.unlabelled == 2


def test_labelled_val_stands_for_a_test_part_without_labels(data: DataParams) -> None:
    splits = ["train"] * 10 + ["val"] * 2 + ["test"] * 2
    found = inspected(data, [encoded(noise())] * 14, [*"ab" * 6, None, None], splits)
    assert found.parts == {"train": 8, "val": 2, "test": 2}


def test_sample_says_formats_modes_and_sizes(data: DataParams) -> None:
    images = [
        encoded(noise(10, 20)), encoded(noise(30, 30), "jpeg"), encoded(noise(8, 8, 4)),
        encoded(Image.fromarray(noise(6, 9)).convert("CMYK"), "tiff"), encoded(Image.fromarray(noise()).quantize(4)),
        encoded(np.full((7, 8), 5000, np.uint16)), noise(12, 8, 1),
    ]  # fmt: skip
    sample = inspected(data, images).sample
    assert sample.formats == {"PNG": 4, "JPEG": 1, "TIFF": 1, "array": 1}
    assert sample.modes == {"RGB": 2, "RGBA": 1, "CMYK": 1, "P": 1, "I;16": 1, "1 × uint8": 1}
    assert sample.short_side == (6, 8, 30)
    assert sample.aspect.most == 2
    assert (sample.channels, sample.transparent) == (3, 1)


def test_bands_of_a_tiff_are_counted(data: DataParams) -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, noise(8, 9, 6), photometric="minisblack", planarconfig="contig")
    sample = inspected(data, [buffer.getvalue()]).sample
    assert (sample.modes, sample.channels, len(sample.mean)) == ({"6 bands": 1}, 6, 6)


def test_statistics_count_every_image_the_same(data: DataParams) -> None:
    colours = np.zeros((4, 4, 3), dtype=np.uint8)
    colours[..., 0] = 255
    sample = inspected(data, [encoded(colours), encoded(np.full((40, 40), 255, np.uint8))]).sample
    assert sample.mean == [1.0, 0.5, 0.5]
    assert sample.std == [0.0, 0.5, 0.5]


def test_grey_images_in_colour_need_one_channel(data: DataParams) -> None:
    grey = noise(8, 8, 1)
    sample = inspected(data, [encoded(np.repeat(grey, 3, axis=2)), encoded(grey[..., 0])]).sample
    assert (sample.channels, sample.grey_in_colour, len(sample.mean)) == (1, 1, 1)
    assert sample.copies == [["0.png", "1.png"]]  # the same pixels


def test_copies_and_their_contradictions_are_named(data: DataParams) -> None:
    a, b, c = (noise() for _ in range(3))
    images = [encoded(a), encoded(a, "bmp"), encoded(b), encoded(b), encoded(c), encoded(c)]
    sample = inspected(data, images, ["x", "y", "x", "x", "x", None]).sample
    assert sample.copies == [["0.png", "1.png"], ["2.png", "3.png"], ["4.png", "5.png"]]
    assert sample.contradictions == [["0.png", "1.png"]]


def test_unreadable_images_have_a_reason(data: DataParams) -> None:
    whole = encoded(noise(40, 40))
    sample = inspected(data, [b"", b"nothing", whole[: len(whole) // 2], refused, whole]).sample
    assert [path for path, _ in sample.unreadable] == ["0.png", "1.png", "2.png", "3.png"]
    assert [sample.unreadable[i].reason for i in (0, 3)] == ["empty", "Permission denied"]
    assert sample.modes == {"RGB": 1}


def test_sample_is_even(data: DataParams) -> None:
    assert even(3, 5) == [0, 1, 2]
    assert even(10, 4) == [0, 2, 5, 7]
    read = [partial(given, encoded(np.full((8, 8), i, np.uint8))) for i in range(10)]
    found = inspect(offers_of(read), data, sample=2)
    assert found.sample.images == 2
    assert found.sample.mean == pytest.approx([2.5 / 255], abs=1e-4)


def test_processes_find_what_one_finds(data: DataParams) -> None:
    images = [encoded(noise(8 + i % 3, 8)) for i in range(ALONE + 1)]
    images[7] = b"damaged"
    many, few = (inspect(offers_of(images), data, sample).sample for sample in (ALONE + 1, 8))
    assert (many.images, few.images) == (ALONE + 1, 8)
    assert [path for path, _ in many.unreadable] == ["7.png"]
    assert many.short_side == (8, 8, 8)


@pytest.mark.parametrize(
    ("splits", "labels", "groups", "fault"),
    [
        ("test", "aabb", None, "none to train on"),
        (["train", "train", "train", "test"], "aabc", None, "test has classes that train lacks: c"),
        ("train", "aaaa", None, "the only class is 'a'"),
        (["train", "train", "test", "test"], "abab", ["g", None, "g", None], "1 groups have images in several parts"),
    ],
)
def test_what_makes_prepare_stop_is_said(splits: Any, labels: str, groups: Any, fault: str, data: DataParams) -> None:
    found = inspected(data, [encoded(noise())] * 4, list(labels), splits, groups=groups or [None] * 4)
    assert [fault in line for line in found.faults] == [True]


def test_empty_source_is_inspected(data: DataParams) -> None:
    found = inspected(data, [])
    assert found.images == 0
    assert found.sample.short_side == (0, 0, 0)


@pytest.mark.parametrize(
    ("side", "cuda", "size", "patch"),
    [(8, False, 8, 2), (28, False, 28, 7), (30, False, 28, 7), (32, True, 32, 8), (480, False, 64, 16),
     (480, True, 224, 16), (100, True, 96, 16), (3, False, 8, 2)],
)  # fmt: skip
def test_sizes_leave_sixteen_patches_or_more(side: int, cuda: bool, size: int, patch: int, data: DataParams) -> None:
    good = suggest_settings(inspected(data, [encoded(noise(side, side + 5))]), cuda)
    assert (good.image_size, good.patch_size) == (size, patch)
    assert size % patch == 0
    assert (size // patch) ** 2 >= 16


@pytest.mark.parametrize(("images", "expected"), [(1, 2), (8, 2), (31, 4), (128, 32), (511, 64), (10**6, 128)])
def test_batch_is_a_power_of_two_within_a_quarter(images: int, expected: int) -> None:
    assert batch_size(images) == expected


@pytest.mark.parametrize(
    ("counts", "shares", "shots"),
    [
        ([200, 200], ["1pct", "10pct"], []),
        ([60, 60], ["10pct"], [1]),
        ([14, 14], [], [1, 5]),
        ([14, 5], [], [1]),
        ([], ["1pct", "10pct"], []),
    ],
)
def test_few_labels_are_of_the_numbers_that_there_are(
    counts: list[int], shares: list[str], shots: list[int], data: DataParams
) -> None:
    few = suggest_few_labels(labelled(data, counts))
    assert (list(few.shares), few.shots) == (shares, shots)
    assert few.names == [*(f"{n}shot" for n in shots), *shares, *(["all"] if counts else [])]


@pytest.mark.parametrize(("each", "few"), [(1300, True), (1600, False)])
def test_all_labels_are_evaluated_where_they_are_few(each: int, few: bool, data: DataParams) -> None:
    assert ("all" in suggest_few_labels(labelled(data, [each, each])).names) == few


def test_advice_names_what_to_set(params: Params, data: DataParams) -> None:
    found = inspected(data, [encoded(noise(40, 90)), encoded(noise(40, 90))], ["a", "b"])
    advice = "\n".join(advise(found, params, cuda=False))
    for line in (
        "set data.image_size to 40, it is 8",
        "set data.channels to 3, it is 1",
        "set model.patch_size to 10, it is 2",
        "set mim.batch_size to 2",
        "fewer than 5 labelled images of a (1), b (1)",
        "1pct of the labels is 0.01 a class",
        "no labelled test image",
        "2.2 times as long as wide",
    ):
        assert line in advice


def test_advice_for_images_without_labels(params: Params, data: DataParams) -> None:
    advice = advise(inspected(data, [encoded(noise()[..., 0])] * 200), params, cuda=False)
    assert [line.partition(":")[0] for line in advice if "label" in line] == ["no image has a label"]


def test_more_unreadable_images_than_prepare_takes_are_told(params: Params, data: DataParams) -> None:
    for broken, told in ((3, 0), (4, 1)):
        found = inspected(data, [b"damaged"] * broken + [noise()] * 20)
        assert sum("`lgp prepare` stops above" in line for line in advise(found, params, cuda=False)) == told


def test_advice_is_silent_about_what_fits(params: Params, data: DataParams) -> None:
    images = [partial(given, encoded(noise()[..., 0])) for _ in range(400)]
    found = inspect(offers_of(images, [*"ab" * 200]), data, sample=10)
    assert advise(found, params, cuda=False) == []


def test_contact_sheet_takes_evenly_from_the_classes() -> None:
    colour = {"a": 250, "b": 120, None: 10}
    labels = [*["a"] * 100, *["b"] * 2, None]
    images = [encoded(np.full((4, 4), colour[label], np.uint8)) for label in labels]
    sheet = np.asarray(contact_sheet(offers_of(images, labels), 1).convert("L"))
    across, down = TILE + MARGIN, TILE + LINE + MARGIN
    rows = -(-IMAGES // COLUMNS)
    assert sheet.shape == (rows * down + MARGIN, COLUMNS * across + MARGIN)
    shown = [sheet[MARGIN + i // COLUMNS * down + 8, MARGIN + i % COLUMNS * across + 8] for i in range(IMAGES)]
    assert shown == [250] * 61 + [120] * 2 + [10]


def test_contact_sheet_draws_any_name_and_damaged_images() -> None:
    names = ["[red]<b>&amp;\n", "\ud800 名", "x" * 300, None]
    images = [encoded(noise()), b"damaged", encoded(noise(200, 3)), refused]
    sheet = contact_sheet(offers_of(images, names), 3)
    assert sheet.width == 4 * (TILE + MARGIN) + MARGIN
    assert contact_sheet(offers_of([noise(5, 5, 6)]), 6).mode == "RGB"
    assert contact_sheet(offers_of([]), 3).width == MARGIN
