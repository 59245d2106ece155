"""From every kind of source to prepared images."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_sources import RNG, both_from, data_params, folder, images_from, labels_from, png, write_parquet
from PIL import Image

from lgp.data.labels import LabelledImages
from lgp.data.preparation import prepare
from lgp.data.storage import decode
from lgp.errors import LgpError
from lgp.params.file import Params


def test_digits_keep_their_pixels_and_labels(prepared: LabelledImages) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    row = int(prepared.paths[5].split("/")[1])
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
    metrics, data = both_from(source, tmp_path, params)
    assert data.classes == ["ant", "bee"]
    assert [metrics[f"images/{s}"] for s in ("train", "unlabeled", "val", "test")] == [20, 1, 2, 7]
    assert len(data.pretraining_ids) == 21
    assert data.labels[data.ids("unlabeled")].tolist() == [-1]
    assert (tmp_path / "prepared" / "images.npy").exists()


def test_images_of_other_sizes_stay_encoded(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10, "bee": 10}, size=(20, 14))
    _, data = images_from(source, tmp_path / "prepared", params)
    assert not (tmp_path / "prepared" / "images.npy").exists()
    assert data.sizes[0].tolist() == [20, 14]
    assert data.whole(data.ids("train")[:3]).shape == (3, 3, 8, 8)
    expected = np.asarray(Image.open(source / data.paths[7]))
    assert np.array_equal(np.asarray(data.open_image(7)), expected)


def test_shards_are_read_back_across_their_borders(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgp.data.writing.SHARD_BYTES", 1500)
    source = folder(tmp_path / "images", {"ant": 10, "bee": 10}, size=(20, 14))
    _, data = images_from(source, tmp_path / "prepared", params)
    assert len(list((tmp_path / "prepared").glob("*.arrow"))) > 3
    for i in range(20):
        expected = np.asarray(Image.open(source / data.paths[i]))
        assert np.array_equal(np.asarray(data.open_image(i)), expected)


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
    of_images, images = images_from(hub, tmp_path / "prepared", params)
    assert [of_images[f"images/{part}"] for part in ("train", "val", "test", "dropped")] == [18, 2, 2, 0]
    assert of_images["unreadable"] == [{"path": "test-00000-of-00001.parquet#0", "reason": "empty"}]
    metrics, data = labels_from(hub, images, tmp_path / "labels", params)
    assert data.classes == ["cat", "dog"]
    assert [metrics[f"images/{s}"] for s in ("train", "unlabeled", "val", "test")] == [16, 2, 2, 2]


def test_unlabelled_test_images_never_reach_pretraining(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [0, 1] * 8, ["cat", "dog"])
    write_parquet(hub / "test.parquet", [0, 1, -1, None], ["cat", "dog"])
    metrics, data = images_from(hub, tmp_path / "prepared", params)
    assert [u["path"] for u in metrics["unreadable"]] == ["test.parquet#2", "test.parquet#3"]
    assert not any("test" in path for path in np.array(data.paths)[data.pretraining_ids])


def test_validation_stands_for_an_absent_test_part(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [0, 1] * 8, ["cat", "dog"])
    write_parquet(hub / "validation.parquet", [0, 1, 1], ["cat", "dog"])
    assert images_from(hub, tmp_path / "prepared", params)[0]["images/test"] == 3


def test_parquet_without_class_names_takes_the_labels_found(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [1, 5, 7] * 6, None)
    data = both_from(hub, tmp_path, params)[1]
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
        images_from(hub, tmp_path / "prepared", params)


def test_sixteen_bit_images_keep_their_range_and_floats_are_refused() -> None:
    buffer = io.BytesIO()
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(buffer, "png")
    assert np.asarray(decode(buffer.getvalue(), 1)).tolist() == [[0, 1, 100, 255]]
    buffer = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(buffer, "tiff")
    with pytest.raises(ValueError, match="mode F, neither 8 nor 16 bits"):
        decode(buffer.getvalue(), 1)


def encoded(image: Image.Image, suffix: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix, **options)
    return buffer.getvalue()


# one row: half transparent black, opaque black, hidden red
COVERED = Image.fromarray(np.array([[[0, 0, 0, 128], [0, 0, 0, 255], [255, 0, 0, 0]]], dtype=np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        encoded(COVERED),
        encoded(COVERED.convert("LA")),
        encoded(COVERED.convert("PA"), "tiff"),
        encoded(COVERED.quantize(3)),
    ],
    ids=["RGBA", "LA", "PA", "palette"],
)
def test_transparent_pixels_lie_on_white(data: bytes) -> None:
    assert np.asarray(decode(data, 1)).tolist() == [[127, 0, 255]]
    assert np.asarray(decode(data, 3)).tolist() == [[[127] * 3, [0] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparent_colour_lies_on_white(mode: str) -> None:
    black = (0, 0, 0) if mode == "RGB" else 0
    data = encoded(Image.fromarray(np.array([[0, 9]], dtype=np.uint8)).convert(mode), transparency=black)
    assert np.asarray(decode(data, 1)).tolist() == [[255, 9]]


def test_images_without_transparency_keep_their_pixels() -> None:
    pixels = RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    opaque = np.concatenate([pixels, np.full((4, 5, 1), 255, dtype=np.uint8)], axis=2)
    for given in (pixels, opaque):
        assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(given)), 3)), pixels)


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
    metrics, data = images_from(source, tmp_path / "prepared", params)
    reasons = {u["path"]: u["reason"] for u in metrics["unreadable"]}
    assert reasons.keys() == {
        f"train/{p}" for p in ("ant/broken.png", "ant/empty.png", "bee/notes.txt", "bee/gone.png", "stray.png")
    }
    assert reasons["train/ant/empty.png"] == "empty"
    assert reasons["train/bee/notes.txt"] == "not an image that can be decoded"
    assert reasons["train/stray.png"].startswith("without a label: not inside a class folder")
    assert len(data.paths) == 22


def test_linked_folders_are_read_once_and_loops_are_listed(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10, "bee": 12})
    pool = folder(tmp_path / "pool", {"deep": 3}, split=".")
    ant, bee = source / "train" / "ant", source / "train" / "bee"
    (ant / "more").symlink_to(pool)
    (pool / "deep" / "back").symlink_to(pool)  # a loop
    (ant / "up").symlink_to("..")  # holds all classes
    (bee / "again").symlink_to(pool / "deep")
    (bee / "other").symlink_to(ant)
    (bee / "self").symlink_to("self")
    metrics, data = images_from(source, tmp_path / "prepared", params)
    reasons = {u["path"]: u["reason"] for u in metrics["unreadable"]}
    listed = {"ant/more/deep/back", "ant/up", "bee/again", "bee/other", "bee/self"}
    assert reasons.keys() == {f"train/{path}" for path in listed}
    assert reasons["train/ant/up"].startswith("a link to a folder that is read anyway")
    assert [p for p in data.paths if "more" in p] == [f"train/ant/more/deep/{i}.png" for i in range(3)]
    assert len(data.paths) == 25


def test_class_folder_may_be_a_link(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10})
    (source / "train" / "bee").symlink_to(folder(tmp_path / "pool", {"bee": 12}, split=".") / "bee")
    metrics, data = both_from(source, tmp_path, params)
    assert np.bincount(data.labels).tolist() == [10, 12]
    assert metrics["images/dropped"] == 0


def test_cap_holds_for_labelled_and_unlabelled_images_together(tmp_path: Path, params: Params) -> None:
    source = folder(folder(tmp_path / "images", {"ant": 20, "bee": 21}), {"ant": 9, "bee": 9}, "test")
    folder(source, {"some": 40}, "unlabeled")
    metrics, images = images_from(source, tmp_path / "prepared", params, max_train_images=33, max_test_images=7)
    assert metrics["images/train"] + metrics["images/val"] == 33
    assert metrics["images/test"] == 7
    assert sum(path.startswith("unlabeled") for path in images.paths) == 16  # 33 * 40 / 81


def test_too_many_unreadable_files_fail(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10, "bee": 12})
    (source / "train" / "ant" / "empty.png").write_bytes(b"")
    with pytest.raises(
        LgpError, match=r"1 of 23 files .* 4\.3%, more than data\.max_unreadable_share 1\.0%.*empty\.png"
    ):
        images_from(source, tmp_path / "prepared", params, max_unreadable_share=0.01)


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
        images_from(tmp_path / "source", tmp_path / "prepared", params)


def test_preparing_twice_gives_the_same_digest_and_another_seed_another(tmp_path: Path, params: Params) -> None:
    digests = []
    for i, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(i)
        out.mkdir()
        digests.append(prepare(params.data, seed, out, tmp_path / "none.csv")[0]["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_prepared_images_hold_no_label(tmp_path: Path, params: Params) -> None:
    """Other labels in the source change who is held out and nothing else."""
    pictures, labels = [png() for _ in range(20)], [0, 1] * 10
    prepared = []
    for number, of_train in enumerate((labels, labels[::-1])):
        hub = tmp_path / f"hub{number}"
        hub.mkdir()
        write_parquet(hub / "train.parquet", of_train, ["cat", "dog"], images=pictures)
        prepared.append(images_from(hub, tmp_path / f"images{number}", params)[1])
    one, other = prepared
    assert sorted(file.name for file in one.folder.iterdir()) == ["images.npy", "index.parquet", "meta.json"]
    assert (one.folder / "images.npy").read_bytes() == (other.folder / "images.npy").read_bytes()
    assert list(one.index) == ["path", "height", "width", "content", "hash", "part"]
    assert one.index.drop(columns="part").equals(other.index.drop(columns="part"))
    assert set(one.meta) == {"image_size", "channels", "eval_crop", "mean", "std", "digest"}


def test_class_folders_without_a_train_folder_are_recognised(tmp_path: Path, params: Params) -> None:
    folder(tmp_path, {"ant": 2, "bee": 2}, split=".")
    with pytest.raises(LgpError, match=r"found the folders ant, bee: are these classes\? then move them into train/"):
        prepare(data_params(params, tmp_path), 0, tmp_path)


@pytest.mark.parametrize("capped", [None, 10])
def test_source_without_an_image_is_an_error(tmp_path: Path, params: Params, capped: int | None) -> None:
    source = folder(tmp_path / "source", {"a": 0, "b": 0})
    with pytest.raises(LgpError, match="the data source holds no image at all"):
        images_from(source, tmp_path / "prepared", params, max_train_images=capped)


def test_class_that_only_test_has_is_named(tmp_path: Path, params: Params) -> None:
    source = folder(folder(tmp_path / "source", {"a": 5, "b": 5}), {"a": 2, "c": 2}, "test")
    with pytest.raises(LgpError, match="test has classes that train lacks: c"):
        images_from(source, tmp_path / "prepared", params)
