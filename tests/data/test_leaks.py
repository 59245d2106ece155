"""Leaks between test and the rest, and labels that must not be read."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Silent
from made_sources import images_from, labels_from
from PIL import Image

from lgp.compute.seals import SEAL
from lgp.data.conversion import as_image
from lgp.data.labels import LabelledImages
from lgp.data.leaks import EXACT, Leak, find_leaks, perceptual_hashes
from lgp.data.storage import Images
from lgp.errors import LgpError
from lgp.params.file import Params
from lgp.pretrain.arm import Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.controls import pretrain_joint
from lgp.pretrain.mim import pretrain_mim
from lgp.training.resume_states import StateStore

RNG = np.random.default_rng(0)


def photograph() -> Image.Image:
    """Smooth colours, as photographs have them."""
    small = RNG.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes; test has an exact copy, a re-encoded one, one of an unlabelled image, and four others."""
    root = tmp_path / "source"
    train = {f"train/{c}/{i}.png": encoded(photograph()) for c in "ab" for i in range(6)}
    train["train/a/twin.png"] = train["train/a/1.png"]
    unlabelled = photograph()
    resized = Image.open(io.BytesIO(train["train/b/2.png"])).resize((48, 48))
    test = {f"test/{c}/new{i}.png": encoded(photograph()) for c in "ab" for i in range(2)}
    copies = {
        "test/a/copy.png": train["train/a/1.png"],
        "test/b/again.jpg": encoded(resized, "jpeg", quality=80),
        "test/b/seen.jpg": encoded(unlabelled, "jpeg", quality=70),
    }
    write(root, train | {"unlabeled/u.png": encoded(unlabelled)} | test | copies)
    return root


def labelled(source: Path, tmp_path: Path, params: Params, **changes: Any) -> tuple[dict[str, Any], LabelledImages]:
    _, images = images_from(source, tmp_path / "prepared", params, image_size=16)
    return labels_from(source, images, tmp_path / "labels", params, **changes)


def test_copies_are_found_and_described(source: Path, tmp_path: Path, params: Params) -> None:
    metrics, data = labelled(source, tmp_path, params, near_duplicate_bits=6)
    assert (metrics["leaks/exact"], metrics["leaks/near"]) == (1, 2)
    found = {leak["test"]: (leak["also"], leak["how"]) for leak in metrics["leaks"]}
    assert found["test/a/copy.png"] == ("train/a/1.png", "the same pixels")
    assert found["test/b/again.jpg"][0] == "train/b/2.png"
    assert found["test/b/seen.jpg"][0] == "unlabeled/u.png"
    assert "of 64 bits apart" in found["test/b/again.jpg"][1]
    assert len(data.ids("test")) == 7


def test_copies_are_dropped_from_test_for_evaluation(source: Path, tmp_path: Path, params: Params) -> None:
    metrics, data = labelled(source, tmp_path, params, near_duplicate_bits=6, leaks="drop_test")
    new = [f"test/{c}/new{i}.png" for c in "ab" for i in range(2)]
    assert sorted(data.paths[i] for i in data.ids("test")) == new
    assert len(data.pretraining_ids) + len(data.ids("val")) == 14
    assert metrics["images/dropped"] == 3


def test_copies_of_test_are_dropped_from_the_images_to_learn_from(source: Path, tmp_path: Path, params: Params) -> None:
    of_images, images = images_from(source, tmp_path / "prepared", params, image_size=16, drop_near_test_bits=6)
    dropped = sorted(images.paths[i] for i in images.ids("dropped"))
    assert dropped == ["train/a/1.png", "train/a/twin.png", "train/b/2.png", "unlabeled/u.png"]
    assert (of_images["images/dropped"], of_images["images/test"]) == (4, 7)
    assert len(images.pretraining_ids) + len(images.ids("val")) == 10
    metrics, data = labels_from(source, images, tmp_path / "labels", params, near_duplicate_bits=6, leaks="drop_test")
    assert (metrics["leaks/exact"], metrics["leaks/near"]) == (0, 0)  # not against images that nobody sees
    assert len(data.ids("test")) == 7
    assert metrics["images/dropped"] == 4
    (tmp_path / "list.txt").write_text("train/a/1.png\ntrain/b/0.png")
    with pytest.raises(LgpError, match=r"not of the training part: train/a/1\.png \(dropped\)"):
        labels_from(source, images, tmp_path / "more", params, lists={"official": str(tmp_path / "list.txt")})


def test_exact_copies_alone(source: Path, tmp_path: Path, params: Params) -> None:
    metrics, _ = labelled(source, tmp_path, params, near_duplicate_bits=None)
    assert (metrics["leaks/exact"], metrics["leaks/near"]) == (1, 0)


def test_dropping_all_of_a_class_is_an_error(source: Path, tmp_path: Path, params: Params) -> None:
    with pytest.raises(LgpError, match="drop_test leaves a class without a test image"):
        labelled(source, tmp_path, params, near_duplicate_bits=32, leaks="drop_test")
    with pytest.raises(LgpError, match=r"drop_near_test_bits 32 leaves a class without an image in train"):
        images_from(source, tmp_path / "none", params, image_size=16, drop_near_test_bits=32)


def all_compared(
    content: np.ndarray, hashes: np.ndarray, test: np.ndarray, learnt: np.ndarray, most_bits: int
) -> tuple[list[Leak], np.ndarray]:
    """Find leaks by comparing every test image with every image to learn from."""
    bits = np.bitwise_count(hashes[test, None] ^ hashes[None, learnt]).astype(int)
    bits[content[test, None] == content[None, learnt]] = EXACT
    nearest = bits.argmin(axis=1)
    rows = zip(test.tolist(), learnt[nearest].tolist(), bits.min(axis=1).tolist(), strict=True)
    leaks = [Leak(*row) for row in rows]
    found = [leak for leak in leaks if leak.bits <= most_bits]
    return sorted(found, key=lambda leak: (leak.bits, leak.test)), learnt[(bits <= most_bits).any(axis=0)]


@pytest.mark.parametrize("most_bits", [0, 1, 2, 4, 7, 15, 31, 32])
@pytest.mark.parametrize("pairs", [7, 2**21])
def test_leaks_are_those_of_comparing_all(monkeypatch: pytest.MonkeyPatch, most_bits: int, pairs: int) -> None:
    """The leaks are the same with ties, many equal hashes, and any order of the positions."""
    monkeypatch.setattr("lgp.data.leaks.PAIRS", pairs)
    rng = np.random.default_rng(most_bits)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    hashes[100:160] = 0  # black images
    for i in range(160, 300):
        flipped = rng.choice(64, rng.integers(0, 10), replace=False).astype(np.uint64)
        hashes[i] = hashes[rng.integers(0, 160)] ^ np.bitwise_or.reduce(np.uint64(1) << flipped, initial=np.uint64(0))
    content = rng.integers(0, 250, 300)
    order = rng.permutation(300)
    for test, learnt in ((order[:120], order[120:]), (np.arange(120, 300), np.arange(120)), (order[:90], order[200:])):
        leaks, in_test = find_leaks(content, hashes, test, learnt, most_bits)
        expected, expected_in_test = all_compared(content, hashes, test, learnt, most_bits)
        assert leaks == expected
        assert in_test.tolist() == expected_in_test.tolist()


def test_exact_leak_goes_before_the_nearest() -> None:
    hashes = np.array([0, 0, 1], dtype=np.uint64)
    content = np.array([b"x", b"y", b"x"], dtype=object)
    leaks, in_test = find_leaks(content, hashes, np.array([2]), np.array([0, 1]), 4)
    assert (leaks, in_test.tolist()) == ([Leak(2, 0, EXACT)], [0, 1])
    leaks, in_test = find_leaks(content, hashes, np.array([2]), np.array([1, 0]), None)
    assert (leaks, in_test.tolist()) == ([Leak(2, 0, EXACT)], [0])
    for test, learnt in (([], [0, 1]), ([0], [])):
        leaks, in_test = find_leaks(content, hashes, np.array(test, dtype=int), np.array(learnt, dtype=int), 4)
        assert (leaks, in_test.tolist()) == ([], [])


def test_black_images_are_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    count = np.bitwise_count
    monkeypatch.setattr("lgp.data.leaks.np.bitwise_count", lambda bits: compared.append(len(bits)) or count(bits))
    hashes = np.random.default_rng(0).integers(0, 2**64, 60_000, dtype=np.uint64)
    hashes[5_000:25_000] = 0
    content = np.arange(60_000)
    leaks, in_test = find_leaks(content, hashes, np.arange(15_000), np.arange(15_000, 60_000), 4)
    assert len(leaks) == len(in_test) == 10_000
    assert {leak.learnt for leak in leaks} == {15_000}
    assert sum(compared) < 15_000 * 45_000 / 500


IMAGES = {
    "noise": [RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(20)],
    "photographs": [np.asarray(photograph().resize((90, 70))) for _ in range(20)],
    "flat": [np.full((9, 8, 3), value, dtype=np.uint8) for value in range(0, 256, 5)],
    "grey": [RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8) for _ in range(20)],
    "alpha": [RNG.integers(0, 256, (20, 14, 4), dtype=np.uint8) for _ in range(5)],
    "sizes": [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((1, 50), (50, 1), (32, 7), (99, 32))] * 3,
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("stacked", [1, 2**22])
def test_hashes_are_the_librarys(monkeypatch: pytest.MonkeyPatch, kind: str, stacked: int) -> None:
    import imagehash

    monkeypatch.setattr("lgp.data.leaks.STACKED", stacked)
    expected = [int(str(imagehash.phash(as_image(pixels))), 16) for pixels in IMAGES[kind]]
    assert perceptual_hashes(IMAGES[kind]).tolist() == expected


def test_hash_of_bands_is_that_of_their_mean() -> None:
    grey = RNG.integers(0, 256, (16, 16, 1), dtype=np.uint8)
    assert perceptual_hashes([np.repeat(grey, 7, axis=2)]) == perceptual_hashes([grey])
    assert perceptual_hashes([]).shape == (0,)


def half_unlabelled(prepared: LabelledImages, folder: Path, poison: int) -> LabelledImages:
    """The same images, of which half of train has no label but `poison` in its place."""
    shutil.copytree(prepared.folder.parent / "labels", folder)
    (folder / SEAL).unlink()
    table = pd.read_parquet(folder / "labels.parquet")
    table.loc[np.flatnonzero(table["split"] == "train")[::2], ["split", "label"]] = ["unlabeled", poison]
    table.to_parquet(folder / "labels.parquet", index=False)
    return LabelledImages(prepared.folder, folder)


@pytest.mark.parametrize("pretrain", [pretrain_mim, pretrain_cl, pretrain_joint])
def test_no_label_of_an_unlabelled_image_is_read(
    prepared: LabelledImages, params: Params, tmp_path: Path, pretrain: Any
) -> None:
    """Garbage in place of labels changes no byte and trips nobody, nor do labels at all, which k-NN alone reads."""
    online_knn = params.run.online_knn.model_copy(update={"every_epochs": 1})
    shown = params.model_copy(update={"run": params.run.model_copy(update={"online_knn": online_knn})})
    labels = [half_unlabelled(prepared, tmp_path / f"labels{poison}", poison) for poison in (-1, 10**9)]
    weights, images = [], Images(prepared.folder)
    for number, labelled in enumerate((*labels, None)):
        session = Session(images, shown, StateStore(tmp_path / f"state{number}", "code"), Silent(), labelled)
        weights.append(pretrain(session).model.encoder.state_dict())
    for others in weights[1:]:
        assert all(torch.equal(tensor, others[name]) for name, tensor in weights[0].items())
