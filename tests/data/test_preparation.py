"""From every kind of source to prepared data."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lgp.data.labels import LabelledImages, decode
from lgp.data.preparation import prepare
from lgp.errors import LgpError
from lgp.params.data import DataParams
from lgp.params.file import Params

RNG = np.random.default_rng(0)


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def data_params(params: Params, **changes: Any) -> DataParams:
    base = {"channels": 3, "max_train_images": None, "max_unreadable_share": 0.2}
    return DataParams.model_validate(params.data.model_dump() | base | changes)


def folder(root: Path, classes: dict[str, int], split: str = "train", size: tuple[int, int] = (8, 8)) -> Path:
    for name, count in classes.items():
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            (root / split / name / f"{i}.png").write_bytes(png(size))
    return root


def prepared_from(
    source: Path, tmp_path: Path, params: Params, **changes: Any
) -> tuple[dict[str, Any], LabelledImages]:
    out = tmp_path / "prepared"
    out.mkdir()
    return prepare(data_params(params, source=str(source), **changes), 0, out), Prepared(out)


def test_digits_keep_their_pixels_and_labels(prepared: LabelledImages) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    row = int(prepared._index["path"].iloc[5].split("/")[1])
    assert np.array_equal(np.asarray(prepared.open_image(5)), np.round(digits.images[row] * 255 / 16))
    assert prepared.labels[5] == digits.target[row]


def test_parts_are_disjoint_and_cover_everything(prepared: LabelledImages) -> None:
    parts = [prepared.ids(split) for split in ("train", "val", "test")]
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together) == len(prepared.labels)
    assert np.array_equal(prepared.pretraining_ids, prepared.ids("train"))
    for share in ("1pct", "10pct"):
        for subset in prepared.subsets(share):
            assert np.isin(subset, prepared.ids("train")).all()


def test_normalised_training_images_have_zero_mean_and_unit_deviation(prepared: LabelledImages) -> None:
    images = prepared.normalize(prepared.whole(prepared.ids("train")))
    assert images.mean().item() == pytest.approx(0, abs=1e-4)
    assert images.std().item() == pytest.approx(1, abs=1e-3)
    back = prepared.denormalize(images)
    assert (back * 255 - prepared.whole(prepared.ids("train"))).abs().max() < 1e-3


def test_image_folder_with_test_and_unlabeled_parts(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10, "bee": 12})
    folder(source, {"ant": 3, "bee": 4}, "test")
    (source / "unlabeled" / "deep").mkdir(parents=True)
    (source / "unlabeled" / "deep" / "x.png").write_bytes(png())
    metrics, data = prepared_from(source, tmp_path, params)
    assert data.classes == ["ant", "bee"]
    assert [metrics[f"images/{s}"] for s in ("train", "unlabeled", "val", "test")] == [20, 1, 2, 7]
    assert len(data.pretraining_ids) == 21
    assert data.labels[data.ids("unlabeled")].tolist() == [-1]
    assert (tmp_path / "prepared" / "images.npy").exists()


def test_images_of_other_sizes_stay_encoded(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10, "bee": 10}, size=(20, 14))
    _, data = prepared_from(source, tmp_path, params)
    assert not (tmp_path / "prepared" / "images.npy").exists()
    assert data.sizes[0].tolist() == [20, 14]
    assert data.whole(data.ids("train")[:3]).shape == (3, 3, 8, 8)
    expected = np.asarray(Image.open(source / data._index["path"].iloc[7]))
    assert np.array_equal(np.asarray(data.open_image(7)), expected)


def test_shards_are_read_back_across_their_borders(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgp.data.preparation.SHARD_BYTES", 1500)
    source = folder(tmp_path / "images", {"ant": 10, "bee": 10}, size=(20, 14))
    _, data = prepared_from(source, tmp_path, params)
    assert len(list((tmp_path / "prepared").glob("*.arrow"))) > 3
    for i in range(20):
        expected = np.asarray(Image.open(source / data._index["path"].iloc[i]))
        assert np.array_equal(np.asarray(data.open_image(i)), expected)


def write_parquet(path: Path, labels: list[int | None], names: list[str] | None, broken: int = 0) -> None:
    images = [{"bytes": b"" if i < broken else png(), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(table, path)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    source = tmp_path / "hub"
    source.mkdir()
    return source


def test_hugging_face_parquet(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train-00000-of-00002.parquet", [0, 1] * 8, ["cat", "dog"])
    write_parquet(hub / "train-00001-of-00002.parquet", [0, 1, None, -1], ["cat", "dog"])
    write_parquet(hub / "validation.parquet", [0, 1], ["cat", "dog"])  # left out: there is a test part
    write_parquet(hub / "test-00000-of-00001.parquet", [0, 1, 1], ["cat", "dog"], broken=1)
    metrics, data = prepared_from(hub, tmp_path, params)
    assert data.classes == ["cat", "dog"]
    assert [metrics[f"images/{s}"] for s in ("train", "unlabeled", "val", "test")] == [16, 2, 2, 2]
    assert metrics["unreadable"] == [{"path": "test-00000-of-00001.parquet#0", "reason": "empty"}]


def test_unlabelled_test_images_never_reach_pretraining(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [0, 1] * 8, ["cat", "dog"])
    write_parquet(hub / "test.parquet", [0, 1, -1, None], ["cat", "dog"])
    metrics, data = prepared_from(hub, tmp_path, params)
    assert [u["path"] for u in metrics["unreadable"]] == ["test.parquet#2", "test.parquet#3"]
    assert not any("test" in path for path in data._index["path"].iloc[data.pretraining_ids])


def test_validation_stands_for_an_absent_test_part(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [0, 1] * 8, ["cat", "dog"])
    write_parquet(hub / "validation.parquet", [0, 1, 1], ["cat", "dog"])
    assert prepared_from(hub, tmp_path, params)[0]["images/test"] == 3


def test_parquet_without_class_names_takes_the_labels_found(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [1, 5, 7] * 6, None)
    data = prepared_from(hub, tmp_path, params)[1]
    assert data.classes == ["1", "5", "7"]
    assert set(data.labels) == {0, 1, 2}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b"x"], "label": [0]}, r"column `image` is binary: expected struct\(bytes, path\)"),
        ({"image": [{"bytes": b"x"}], "label": ["cat"]}, "column `label` is string: expected integers"),
        ({"image": [{"bytes": b"x"}]}, "column `label` is absent"),
        (None, "cannot be read as Parquet"),
    ],
)
def test_parquet_of_another_layout_is_explained(
    hub: Path, tmp_path: Path, params: Params, columns: dict[str, Any] | None, message: str
) -> None:
    path = hub / "train.parquet"
    pq.write_table(pa.table(columns), path) if columns else path.write_bytes(b"")
    with pytest.raises(LgpError, match=message):
        prepared_from(hub, tmp_path, params)


def test_sixteen_bit_images_keep_their_range_and_floats_are_refused() -> None:
    buffer = io.BytesIO()
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(buffer, "png")
    assert np.asarray(decode(buffer.getvalue(), 1)).tolist() == [[0, 1, 100, 255]]
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(buffer, "tiff")
    with pytest.raises(ValueError, match="mode F, neither 8 nor 16 bits"):
        decode(buffer.getvalue(), 1)


def test_photographs_are_turned_upright() -> None:
    image = Image.new("RGB", (16, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", exif=exif)
    assert decode(buffer.getvalue(), 3).size == (8, 16)


def test_unreadable_files_are_listed_with_reason(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10, "bee": 12})
    (source / "train" / "ant" / "broken.png").write_bytes(png()[:60])
    (source / "train" / "ant" / "empty.png").write_bytes(b"")
    (source / "train" / "bee" / "notes.txt").write_text("not an image")
    (source / "train" / "stray.png").write_bytes(png())
    (source / "train" / "bee" / ".hidden").write_text("")
    (source / "train" / "bee" / ".cache").mkdir()
    (source / "train" / "bee" / ".cache" / "copy.png").write_bytes(png())
    (source / "train" / "bee" / "gone.png").symlink_to(source / "nowhere.png")
    metrics, data = prepared_from(source, tmp_path, params)
    reasons = {u["path"]: u["reason"] for u in metrics["unreadable"]}
    assert reasons.keys() == {
        f"train/{p}" for p in ("ant/broken.png", "ant/empty.png", "bee/notes.txt", "bee/gone.png", "stray.png")
    }
    assert reasons["train/ant/empty.png"] == "empty"
    assert reasons["train/bee/notes.txt"] == "not an image that can be decoded"
    assert reasons["train/stray.png"].startswith("without a label: not inside a class folder")
    assert len(data.labels) == 22


def test_too_many_unreadable_files_fail(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10, "bee": 12})
    (source / "train" / "ant" / "empty.png").write_bytes(b"")
    with pytest.raises(
        LgpError, match=r"1 of 23 files .* 4\.3%, more than data\.max_unreadable_share 1\.0%.*empty\.png"
    ):
        prepared_from(source, tmp_path, params, max_unreadable_share=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "neither train/CLASS"),
        (lambda root: (root / "train").mkdir(parents=True), "has no class folder"),
        (
            lambda root: (folder(root, {"ant": 9}), (root / "train" / "bee").mkdir()),
            "no readable training image in class bee",
        ),
        (lambda root: folder(folder(root, {"ant": 9}), {"wasp": 2}, "test"), "classes that train lacks: wasp"),
        (lambda root: folder(root, {"ant": 9}), "the only class is 'ant'"),
        (lambda root: folder(root, {"ant": 9, "bee": 2}), r"fewer than 3 readable training images in class bee \(2\)"),
        (lambda root: (root.mkdir(), write_parquet(root / "some.parquet", [0], None)), "cannot tell the split"),
        (
            lambda root: (root.mkdir(), write_parquet(root / "test.parquet", [0], None)),
            "no Parquet file of a train split",
        ),
    ],
)
def test_unusable_source_is_explained(tmp_path: Path, params: Params, make: Any, message: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(LgpError, match=message):
        prepared_from(tmp_path / "source", tmp_path, params)


def test_preparing_twice_gives_the_same_digest_and_another_seed_another(tmp_path: Path, params: Params) -> None:
    digests = []
    for i, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(i)
        out.mkdir()
        digests.append(prepare(params.data, seed, out)["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_unknown_share_names_those_there_are(prepared: LabelledImages) -> None:
    with pytest.raises(LgpError, match=r"no few-label subsets '5pct': prepared are 1pct, 10pct"):
        prepared.subsets("5pct")


def test_class_folders_without_a_train_folder_are_recognised(tmp_path: Path, params: Params) -> None:
    folder(tmp_path, {"ant": 2, "bee": 2}, split=".")
    with pytest.raises(LgpError, match=r"found the folders ant, bee: are these classes\? then move them into train/"):
        prepare(data_params(params, source=str(tmp_path)), 0, tmp_path)


def test_published_lists_are_kept_in_training_whatever_is_capped_or_held_out(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"a": 20, "b": 20})
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(12)]
    (tmp_path / "list.txt").write_text("\n".join(names))
    given = {"few_label_lists": {"official": str(tmp_path / "list.txt")}, "max_train_images": 28, "val_share": 0.5}
    _, data = prepared_from(source, tmp_path, params, **given)
    (subset,) = data.subsets("official")
    assert sorted(data._index["path"].iloc[subset]) == sorted(names)
    assert set(subset) <= set(data.ids("train"))


def test_list_is_refused_before_anything_is_decoded(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "source", {"a": 5, "b": 5})
    (tmp_path / "list.txt").write_text("train/a/0.png\ntrain/b/77.png")
    monkeypatch.setattr("lgp.data.preparation._read", lambda *_: pytest.fail("decoded"))
    with pytest.raises(LgpError, match=r"unknown: train/b/77\.png"):
        prepared_from(source, tmp_path, params, few_label_lists={"official": str(tmp_path / "list.txt")})


def test_listed_image_that_cannot_be_read_is_named(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"a": 20, "b": 20})
    (source / "train" / "a" / "3.png").write_bytes(b"damaged")
    (tmp_path / "list.txt").write_text("train/a/3.png\ntrain/b/7.png")
    with pytest.raises(LgpError, match=r"official names train/a/3\.png, which cannot be read"):
        prepared_from(source, tmp_path, params, few_label_lists={"official": str(tmp_path / "list.txt")})


def test_shot_that_a_class_cannot_give_is_refused_before_anything_is_decoded(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "source", {"a": 20, "b": 4})
    monkeypatch.setattr("lgp.data.preparation._read", lambda *_: pytest.fail("decoded"))
    with pytest.raises(LgpError, match=r"5 images of each class, fewer are in the training part of b \(4\)"):
        prepared_from(source, tmp_path, params, few_label_shots=[5])


def test_source_without_an_image_is_an_error(tmp_path: Path, params: Params) -> None:
    with pytest.raises(LgpError, match="the data source holds no image at all"):
        prepared_from(folder(tmp_path / "source", {"a": 0, "b": 0}), tmp_path, params)


def test_class_that_only_test_has_is_named(tmp_path: Path, params: Params) -> None:
    source = folder(folder(tmp_path / "source", {"a": 5, "b": 5}), {"a": 2, "c": 2}, "test")
    with pytest.raises(LgpError, match="test has classes that train lacks: c"):
        prepared_from(source, tmp_path, params)
