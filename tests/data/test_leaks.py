"""Leaks between test and the rest, and labels that must not be read."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Silent
from PIL import Image

from lgp.data.labels import LabelledImages
from lgp.data.leaks import EXACT, Leak, find_leaks, perceptual_hash
from lgp.data.preparation import prepare
from lgp.errors import LgpError
from lgp.params.data import DataParams
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


def prepared_from(
    source: Path, tmp_path: Path, params: Params, **changes: Any
) -> tuple[dict[str, Any], LabelledImages]:
    out = tmp_path / "prepared"
    out.mkdir()
    changes = {"channels": 3, "image_size": 16, "max_train_images": None, "source": str(source)} | changes
    return prepare(DataParams.model_validate(params.data.model_dump() | changes), 0, out), Prepared(out)


def test_copies_are_found_and_described(source: Path, tmp_path: Path, params: Params) -> None:
    metrics, data = prepared_from(source, tmp_path, params, near_duplicate_bits=6)
    assert (metrics["leaks/exact"], metrics["leaks/near"]) == (1, 2)
    found = {leak["test"]: (leak["also"], leak["how"]) for leak in metrics["leaks"]}
    assert found["test/a/copy.png"] == ("train/a/1.png", "the same file")
    assert found["test/b/again.jpg"][0] == "train/b/2.png"
    assert found["test/b/seen.jpg"][0] == "unlabeled/u.png"
    assert "of 64 bits apart" in found["test/b/again.jpg"][1]
    assert len(data.ids("test")) == 7


@pytest.mark.parametrize(("leaks", "test", "others"), [("drop_test", 4, 14), ("drop_train", 7, 10)])
def test_copies_are_dropped_on_one_side(
    source: Path, tmp_path: Path, params: Params, leaks: str, test: int, others: int
) -> None:
    metrics, data = prepared_from(source, tmp_path, params, near_duplicate_bits=6, leaks=leaks)
    assert len(data.ids("test")) == test
    assert len(data.pretraining_ids) + len(data.ids("val")) == others
    assert metrics["images/dropped"] == (3 if leaks == "drop_test" else 4)


def test_exact_copies_alone(source: Path, tmp_path: Path, params: Params) -> None:
    metrics, _ = prepared_from(source, tmp_path, params, near_duplicate_bits=None)
    assert (metrics["leaks/exact"], metrics["leaks/near"]) == (1, 0)


def test_dropping_all_of_a_class_is_an_error(source: Path, tmp_path: Path, params: Params) -> None:
    with pytest.raises(LgpError, match="drop_test leaves a class without an image in test"):
        prepared_from(source, tmp_path, params, near_duplicate_bits=32, leaks="drop_test")


def test_nearest_is_found_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgp.data.leaks.QUERIES", 3)
    monkeypatch.setattr("lgp.data.leaks.CANDIDATES", 4)
    hashes = RNG.integers(0, 2**63, 40, dtype=np.uint64)
    hashes[33] = hashes[12] ^ np.uint64(0b101)
    hashes[20] = hashes[12] ^ np.uint64(0b111)
    content = np.array([bytes([i]) for i in range(40)], dtype=object)
    content[38] = content[5]
    content[6] = content[5]
    leaks, in_test = find_leaks(content, hashes, np.arange(30, 40), np.arange(30), 4)
    assert leaks == [Leak(38, 5, EXACT), Leak(33, 20, 1)]
    assert in_test.tolist() == [5, 6, 12, 20]


def test_hash_is_the_librarys() -> None:
    import imagehash

    image = photograph()
    bits = imagehash.phash(image).hash.flatten()
    assert perceptual_hash(image) == sum(int(bit) << (63 - i) for i, bit in enumerate(bits))


@pytest.mark.parametrize("pretrain", [pretrain_mim, pretrain_cl, pretrain_joint])
def test_no_label_of_an_unlabelled_image_is_read(
    prepared: LabelledImages, params: Params, tmp_path: Path, pretrain: Any
) -> None:
    """Poisoned labels: with half of train unlabelled, garbage in their place changes no byte and trips nobody."""
    weights = []
    for number, poison in enumerate((-1, 10**9)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file in prepared.folder.iterdir():
            (folder / file.name).symlink_to(file.resolve())
        index = pd.read_parquet(prepared.folder / "index.parquet")
        unlabelled = np.flatnonzero(index["split"] == "train")[::2]
        index.loc[unlabelled, ["split", "label"]] = ["unlabeled", poison]
        (folder / "index.parquet").unlink()
        index.to_parquet(folder / "index.parquet", index=False)
        shown = params.model_copy(
            update={
                "run": params.run.model_copy(
                    update={"online_knn": params.run.online_knn.model_copy(update={"every_epochs": 1})}
                )
            }
        )
        session = Session(Prepared(folder), shown, StateStore(tmp_path / f"state{number}", "code"), Silent())
        weights.append(pretrain(session).encoder.state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
