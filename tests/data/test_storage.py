"""What is stored is found again by its id, however it is stored."""

import functools
import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_offers import data_params, noise, offers_from, offers_of, stored
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from lgp.data import stored as stored_module
from lgp.data import writing
from lgp.data.conversion import encode
from lgp.data.reading import content_of
from lgp.data.sources.offers import read_file
from lgp.data.storage import Images, KeptImages
from lgp.data.stored import ARRAY, INDEX, LONGEST_STRIP, META, shards_in, square
from lgp.errors import LgpError

KINDS = ("array", "shards", "reference")


def prepared(tmp_path: Path, pixels: list[np.ndarray], kind: str) -> Images:
    """Store images as `kind` says, with an index that is sorted by content."""
    channels = pixels[0].shape[2]
    params = data_params(channels, storage="reference" if kind == "reference" else "copy")
    tmp_path.mkdir(exist_ok=True)
    offers = offers_from(pixels)
    if kind == "reference":
        for number, image in enumerate(pixels):
            (tmp_path / f"{number}.png").write_bytes(encode(image))
        offers = offers_of([functools.partial(read_file, tmp_path / f"{i}.png") for i in range(len(pixels))])
    result, out = stored(tmp_path, offers, params)
    table = result.table.assign(row=np.arange(len(pixels)), path=[offers.paths[i] for i in result.table["position"]])
    table["part"] = ["train", "train", "val", "test"] * (len(table) // 4)
    table.sort_values("content").to_parquet(out / INDEX, index=False)
    meta = {"image_size": 8, "channels": channels, "eval_crop": 1.0, "mean": [0.5] * channels, "std": [0.2] * channels}
    (out / META).write_text(json.dumps(meta))
    return Images(out)


def by_content(pixels: list[np.ndarray]) -> list[np.ndarray]:
    return sorted(pixels, key=content_of)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PIECE_IMAGES", 5)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_each_id_gives_its_image(tmp_path: Path, kind: str, channels: int) -> None:
    sizes = [(8, 8)] if kind == "array" else [(8, 8), (9, 20), (31, 8)]
    pixels = [noise(*sizes[i % len(sizes)], channels) for i in range(12)]
    images, expected = prepared(tmp_path, pixels, kind), by_content(pixels)
    assert (images.folder / ARRAY).exists() == (kind == "array")
    assert len(shards_in(images.folder)) == {"shards": 3}.get(kind, 0)
    for image_id, image in enumerate(expected):
        found = images.pixels(image_id)
        assert np.array_equal(found, image)
        assert found.flags.writeable
        assert tuple(images.sizes[image_id]) == image.shape[:2]
        assert np.array_equal(pixels[int(images.paths[image_id].split(".")[0])], image)
        if channels <= 4:
            assert np.array_equal(np.atleast_3d(np.asarray(images.open_image(image_id))), image)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_crops_are_of_their_images(tmp_path: Path, kind: str, channels: int) -> None:
    size = (8, 8) if kind == "array" else (20, 31)
    pixels = [noise(*size, channels) for _ in range(8)]
    images, expected = prepared(tmp_path, pixels, kind), by_content(pixels)
    ids = np.array([5, 0, 7, 7])
    boxes = torch.tensor([[[0, 0, 8, 8], [1, 2, 5, 6]]] * 4)
    for mode in ("bilinear", "bicubic"):
        crops = images.crops(ids, boxes, mode)
        assert crops.shape == (4, 2, channels, 8, 8)
        for image_id, (whole, part) in zip(ids, crops, strict=True):
            image = torch.from_numpy(expected[image_id]).permute(2, 0, 1)
            assert torch.equal(whole, image[:, :8, :8])
            cut = F.interpolate(image[None, :, 1:6, 2:8], (8, 8), mode=mode, antialias=True)[0]
            assert (part.int() - cut.int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_images_are_resized_and_cropped(tmp_path: Path, kind: str, channels: int) -> None:
    size = (8, 8) if kind == "array" else (16, 25)
    pixels = [noise(*size, channels) for _ in range(8)]
    images, expected = prepared(tmp_path, pixels, kind), by_content(pixels)
    ids = np.array([3, 6, 0])
    whole = images.whole(ids)
    assert whole.shape == (3, channels, 8, 8)
    for image_id, image in zip(ids, whole, strict=True):
        bands = [expected[image_id]] if channels in (1, 3) else np.split(expected[image_id], channels, axis=2)
        given = [Image.fromarray(band.squeeze()) for band in bands]
        theirs = [tvf.pil_to_tensor(tvf.center_crop(tvf.resize(g, [8], antialias=True), [8, 8])) for g in given]
        assert torch.equal(image, torch.cat(theirs))
    assert images.normalize(whole).shape == whole.shape


def test_images_of_many_channels_cannot_be_shown(tmp_path: Path) -> None:
    images = prepared(tmp_path, [noise(8, 8, 5) for _ in range(4)], "array")
    with pytest.raises(LgpError, match="images of 5 channels"):
        images.open_image(0)


def test_parts_and_ids_follow_the_index(tmp_path: Path) -> None:
    images = prepared(tmp_path, [noise(8, 8, 1) for _ in range(8)], "array")
    assert images.parts.tolist() == images.index["part"].tolist()
    assert images.ids("test").tolist() == np.flatnonzero(images.index["part"] == "test").tolist()
    assert images.pretraining_ids.tolist() == images.ids("train").tolist()
    assert len(images.ids("train")) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_opened_has_no_object_per_image(tmp_path: Path, kind: str) -> None:
    """Forked workers share it: counting references to objects would copy their memory."""
    pixels = [noise(8, 8 + (kind == "shards"), 3) for _ in range(8)]
    images = prepared(tmp_path, pixels, kind)
    images.keep_decoded(0)
    images.crops(images.pretraining_ids, torch.tensor([[[0, 0, 4, 4]]] * 4))
    for name, value in vars(images).items():
        if isinstance(value, np.ndarray):
            assert value.dtype.kind in "iuU", name
    assert {"paths", "index"}.isdisjoint(vars(images))


def test_changed_and_absent_files_of_references_are_named(tmp_path: Path) -> None:
    images = prepared(tmp_path, [noise(8, 8, 3) for _ in range(4)], "reference")
    file = tmp_path / images.paths[2]
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(LgpError, match=rf"{file} has changed since .*: restore it, or run `lgp prepare` again"):
        images.pixels(2)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert images.pixels(2).shape == (8, 8, 3)
    file.write_bytes(file.read_bytes() + b"\0")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(LgpError, match="has changed since"):
        images.whole(np.array([2]))
    file.unlink()
    with pytest.raises(LgpError, match=rf"{file} of the prepared images cannot be read, No such file.*lgp prepare"):
        images.pixels(2)


def test_kept_images_are_those_that_were_reserved() -> None:
    ids, sizes = np.array([2, 5, 9]), np.array([[2, 3], [4, 1], [1, 1]])
    kept, read = KeptImages(ids, sizes, 2), []

    def decoded(image_id: int) -> np.ndarray:
        read.append(image_id)
        height, width = dict(zip(ids.tolist(), sizes.tolist(), strict=True)).get(image_id, (7, 7))
        return np.full((height, width, 2), image_id, dtype=np.uint8)

    for image_id in (5, 2, 9, 1, 10, 5, 2, 9, 1):
        image = kept.get(image_id, decoded)
        assert np.array_equal(image, decoded(image_id))
        read.pop()
    assert read == [5, 2, 9, 1, 10, 1]  # those without a place are read each time


def test_more_shards_than_files_may_be_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PIECE_IMAGES", 1)
    pixels = [noise(8, 9, 1) for _ in range(80)]
    images = prepared(tmp_path, pixels, "shards")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        assert np.array_equal(images.pixels(79), by_content(pixels)[79])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("turned", [False, True])
def test_strip_is_cut_before_it_is_resized(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole strip of 1 × 8,000 would be 224 × 1,792,000 pixels once resized."""
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(image: Image.Image, size: tuple[int, int], *more: Any) -> Image.Image:
        sizes.append(size)
        return resize(image, size, *more)

    monkeypatch.setattr(Image.Image, "resize", noted)
    strip = np.arange(8000)[None, :, None].astype(np.uint8)  # its middle is 4,000, where 159 meets 160
    cut = square(strip.swapaxes(0, 1) if turned else strip, 224, 224, Image.Resampling.BILINEAR)
    assert cut.shape == (224, 224, 1)
    assert set(np.unique(cut)) == {159, 160}
    assert max(map(max, sizes)) <= 224 * (LONGEST_STRIP + 1)


@pytest.mark.parametrize("length", [LONGEST_STRIP * 6, LONGEST_STRIP * 6 + 1, LONGEST_STRIP * 6 + 8])
def test_cutting_a_strip_changes_no_pixel_of_its_square(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    strip = np.random.default_rng(0).integers(0, 256, (6, length, 3), dtype=np.uint8)
    cut = square(strip, 12, 12, Image.Resampling.BICUBIC)
    monkeypatch.setattr(stored_module, "LONGEST_STRIP", 10**6)
    assert np.array_equal(cut, square(strip, 12, 12, Image.Resampling.BICUBIC))
