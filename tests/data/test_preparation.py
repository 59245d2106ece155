"""From every kind of source to prepared images."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_sources import both_from, data_params, folder, images_from, labels_from, png, write_parquet
from PIL import Image

from lgp.data import preparation, statistics
from lgp.data.labels import LabelledImages, describe
from lgp.data.preparation import prepare
from lgp.data.storage import Images
from lgp.data.stored import ARRAY
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
    monkeypatch.setattr("lgp.data.writing.PIECE_BYTES", 1500)
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
    write_parquet(hub / "validation.parquet", [0, 1], ["cat", "dog"])
    write_parquet(hub / "test-00000-of-00001.parquet", [0, 1, 1], ["cat", "dog"], broken=1)
    of_images, images = images_from(hub, tmp_path / "prepared", params)
    assert [of_images[f"images/{part}"] for part in ("train", "val", "test", "dropped")] == [20, 2, 2, 0]
    assert of_images["unreadable"] == [{"path": "test-00000-of-00001.parquet#0", "reason": "empty"}]
    metrics, data = labels_from(hub, images, tmp_path / "labels", params)
    assert data.classes == ["cat", "dog"]
    assert [metrics[f"images/{s}"] for s in ("train", "unlabeled", "val", "test")] == [18, 2, 2, 2]
    assert all("validation" in data.paths[i] for i in data.ids("val"))


def test_unlabelled_test_images_never_reach_pretraining(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [0, 1] * 8, ["cat", "dog"])
    write_parquet(hub / "test.parquet", [0, 1, -1, None], ["cat", "dog"])
    metrics, data = both_from(hub, tmp_path, params)
    assert (metrics["images/test"], metrics["images/dropped"]) == (2, 2)
    assert not any("test" in path for path in np.array(data.paths)[data.pretraining_ids])


@pytest.mark.parametrize("hidden", [None, [-1, -1, -1]])
def test_validation_stands_for_an_absent_or_hidden_test_part(
    hub: Path, tmp_path: Path, params: Params, hidden: list[int] | None
) -> None:
    write_parquet(hub / "train.parquet", [0, 1] * 8, ["cat", "dog"])
    write_parquet(hub / "validation.parquet", [0, 1, 1], ["cat", "dog"])
    if hidden:
        write_parquet(hub / "test.parquet", hidden, ["cat", "dog"])
    metrics, data = both_from(hub, tmp_path, params)
    assert [metrics[f"images/{s}"] for s in ("train", "val", "test")] == [14, 2, 3]
    assert metrics["images/dropped"] == len(hidden or [])
    assert all("validation" in data.paths[i] for i in data.ids("test"))


def test_parquet_without_class_names_takes_the_labels_found(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [1, 5, 7] * 6, None)
    data = both_from(hub, tmp_path, params)[1]
    assert data.classes == ["1", "5", "7"]
    assert set(data.labels) == {0, 1, 2}


def test_file_that_is_no_parquet_is_explained(hub: Path, tmp_path: Path, params: Params) -> None:
    write_parquet(hub / "train.parquet", [0, 1], ["cat", "dog"])
    (hub / "test.parquet").write_bytes(b"")
    with pytest.raises(LgpError, match=r"test\.parquet cannot be read as Parquet: .*; mend or remove it"):
        images_from(hub, tmp_path / "prepared", params)


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
    reasons = {u["path"]: u["reason"] for u in [*metrics["unreadable"], *metrics["skipped"]]}
    assert reasons == {
        "train/ant/broken.png": reasons["train/ant/broken.png"],
        "train/ant/empty.png": "empty",
        "train/bee/notes.txt": "no image by its name (.txt)",
        "train/bee/gone.png": "a link to nothing",
        "train/bee/.hidden": "hidden, or of the operating system",
        "train/bee/.cache": "hidden, or of the operating system",
    }
    assert "truncated" in reasons["train/ant/broken.png"]
    rows = (tmp_path / "prepared" / "skipped.csv").read_text().splitlines()
    assert len(rows) - 1 == metrics["skipped_files"] == len(reasons)
    assert len(data.paths) == 23  # with the image beside the classes, which has no label
    assert metrics["unreadable_share"] == pytest.approx(2 / 25, abs=1e-6)


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
    reasons = {u["path"]: u["reason"] for u in metrics["skipped"]}
    listed = {"ant/more/deep/back", "ant/up", "bee/again", "bee/other", "bee/self"}
    assert reasons.keys() == {f"train/{path}" for path in listed}
    assert reasons["train/ant/up"].startswith("a link to a folder that is read anyway")
    assert sorted(p for p in data.paths if "more" in p) == [f"train/ant/more/deep/{i}.png" for i in range(3)]
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


def test_too_many_unreadable_files_fail_and_a_few_do_not(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "images", {"ant": 10, "bee": 12})
    for i in range(3):
        (source / "train" / "ant" / f"empty{i}.png").write_bytes(b"")
    metrics, _ = images_from(source, tmp_path / "prepared", params, max_unreadable_share=0.01)
    assert len(metrics["unreadable"]) == 3
    (source / "train" / "ant" / "empty3.png").write_bytes(b"")
    with pytest.raises(
        LgpError, match=r"4 of 26 files .* 15\.4%, more than data\.max_unreadable_share 1\.0%.*empty0\.png"
    ):
        images_from(source, tmp_path / "again", params, max_unreadable_share=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "the data source holds no image at all"),
        (lambda root: (root / "train").mkdir(parents=True), "the data source holds no image at all"),
        (lambda root: folder(folder(root, {"ant": 9}), {"wasp": 2}, "test"), "test has classes that train lacks: wasp"),
        (lambda root: folder(root, {"ant": 9}), "the only class is 'ant'"),
        (lambda root: folder(root, {"ant": 9}, "test"), "has images of test, none to train on"),
        (
            lambda root: (root.mkdir(), write_parquet(root / "test.parquet", [0], None)),
            "has images of test, none to train on",
        ),
    ],
)
def test_unusable_source_is_explained(tmp_path: Path, params: Params, make: Any, message: str) -> None:
    make(tmp_path / "source")
    with pytest.raises(LgpError, match=message):
        both_from(tmp_path / "source", tmp_path, params)


def test_class_without_an_image_is_told_and_no_class(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"ant": 9, "bee": 9, "wasp": 0})
    metrics, images = images_from(source, tmp_path / "prepared", params)
    assert metrics["notes"] == ["no labelled image of wasp: not evaluated"]
    assert labels_from(source, images, tmp_path / "labels", params)[1].classes == ["ant", "bee"]


def test_class_with_one_image_is_told_and_stays_in_training(tmp_path: Path, params: Params) -> None:
    metrics, data = both_from(folder(tmp_path / "source", {"ant": 9, "bee": 1}), tmp_path, params)
    assert data.parts[data.labels == 1].tolist() == ["train"]
    assert metrics["images/train"] == 7


def test_images_without_labels_train_and_nothing_is_evaluated(tmp_path: Path, params: Params) -> None:
    for i in range(12):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{i}.png").write_bytes(png())
    metrics, images = images_from(tmp_path / "source", tmp_path / "prepared", params)
    assert metrics["images/train"] == len(images.pretraining_ids) == 12
    assert metrics["notes"][-1].startswith("no image has a label: encoders can be trained")
    of_labels, data = labels_from(tmp_path / "source", images, tmp_path / "labels", params)
    assert (of_labels["classes"], of_labels["images/unlabeled"]) == (0, 12)
    assert describe(of_labels, params.labels) == ["0 train, 12 unlabeled, 0 val, 0 test images in 0 classes"]
    with pytest.raises(LgpError, match="no image has a label, so nothing can be evaluated"):
        data.check_evaluable()


def test_all_labels_may_be_trained_on(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"ant": 9, "bee": 9})
    metrics, images = images_from(source, tmp_path / "prepared", params, test_share=0, val_share=0)
    assert metrics["images/train"] == 18
    assert metrics["notes"] == [
        "no test image: accuracy is not measured",
        "no val image: nothing can be chosen by validation",
    ]
    _, data = labels_from(source, images, tmp_path / "labels", params)
    with pytest.raises(LgpError, match=r"no test image is held out, .* set data\.test_share above 0"):
        data.check_evaluable()


@pytest.mark.parametrize("part", ["test", "val"])
def test_part_without_labels_is_not_used_and_another_is_drawn(tmp_path: Path, params: Params, part: str) -> None:
    source = folder(tmp_path / "source", {"ant": 10, "bee": 10})
    (source / part).mkdir()
    for i in range(3):
        (source / part / f"{i}.png").write_bytes(png())
    metrics, data = both_from(source, tmp_path, params)
    assert [metrics[f"images/{s}"] for s in ("train", "val", "test", "dropped")] == [14, 2, 4, 3]
    data.check_evaluable()


def test_images_left_out_by_a_cap_are_told(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"ant": 10, "bee": 10})
    metrics, _ = images_from(source, tmp_path / "prepared", params, max_train_images=12)
    assert metrics["notes"] == ["8 images are left out by data.max_train_images or max_test_images"]


def parts_by_path(images: Images) -> dict[str, set[str]]:
    paths = np.array(images.paths)
    return {part: set(paths[images.parts == part]) for part in ("train", "val", "test")}


def grown(source: Path, upto: int) -> None:
    """Add images to every class until it has `upto`."""
    for name in "ab":
        for i in range(upto):
            file = source / "train" / name / f"{i}.png"
            file.exists() or file.write_bytes(png())


@pytest.mark.parametrize("size", [(8, 8), (9, 11)])
def test_images_that_are_held_out_stay_whatever_a_cap_leaves(
    tmp_path: Path, params: Params, size: tuple[int, int]
) -> None:
    source = folder(tmp_path / "source", {"a": 40, "b": 40}, size=size)
    first, images = images_from(source, tmp_path / "0", params, max_train_images=30)
    before = parts_by_path(images)
    assert [len(before[part]) for part in ("train", "val", "test")] == [22, 2, 6]
    again, images = images_from(source, tmp_path / "1", params, max_train_images=30)
    assert parts_by_path(images) == before
    assert again["digest"] == first["digest"]
    for number, upto in enumerate((44, 150)):
        grown(source, upto)
        metrics, images = images_from(source, tmp_path / f"grown{number}", params, max_train_images=30)
        now = parts_by_path(images)
        assert (now["val"], now["test"]) == (before["val"], before["test"])
        assert len(now["train"]) == 22
        assert metrics["notes"] == [f"{2 * upto - 30} images are left out by data.max_train_images or max_test_images"]


def test_cap_that_comes_later_leaves_what_is_held_out(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"a": 60, "b": 60})
    before = parts_by_path(images_from(source, tmp_path / "0", params)[1])
    now = parts_by_path(images_from(source, tmp_path / "1", params, max_train_images=10)[1])
    assert (now["val"], now["test"]) == (before["val"], before["test"])
    assert len(now["train"]) == 6  # of each class 5, of which a draw holds out 2
    assert now["train"] < before["train"]


def test_groups_that_are_held_out_stay_whatever_a_cap_leaves(tmp_path: Path, params: Params) -> None:
    (tmp_path / "raw").mkdir()

    def states(count: int, out: str) -> dict[str, set[str]]:
        for i in range(count):
            file = tmp_path / "raw" / f"{i}.png"
            file.exists() or file.write_bytes(png())
        rows = [f"{i}.png,{'ab'[i % 2]},g{i // 4}" for i in range(count)]
        (tmp_path / "raw" / "t.csv").write_text("\n".join(["path,label,group", *rows]))
        return parts_by_path(images_from(tmp_path / "raw" / "t.csv", tmp_path / out, params, max_train_images=40)[1])

    before = states(120, "0")
    assert states(120, "1") == before
    now = states(400, "2")
    assert now["val"] >= before["val"]
    assert now["test"] >= before["test"]
    assert 20 < len(now["train"]) <= 30


def test_held_out_images_that_were_not_found_are_told(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"a": 40, "b": 40})
    before = parts_by_path(images_from(source, tmp_path / "0", params, max_train_images=30)[1])
    gone = sorted(before["test"])[0]
    (source / gone).unlink()
    other = sorted(before["test"])[1]
    (source / other).rename(source / "train" / "a" / "renamed.png")
    metrics, images = images_from(source, tmp_path / "1", params)
    assert metrics["notes"][0].startswith("1 of 8 images and groups that are held out were not found: they left")
    assert parts_by_path(images)["test"] == before["test"] - {gone, other} | {"train/a/renamed.png"}
    # its new path is known now
    images = images_from(source, tmp_path / "2", params, max_train_images=4)[1]
    assert "train/a/renamed.png" in parts_by_path(images)["test"]


def test_new_role_of_val_is_told(tmp_path: Path, params: Params) -> None:
    source = folder(folder(tmp_path / "source", {"a": 20, "b": 20}), {"a": 4, "b": 4}, "val")
    notes = images_from(source, tmp_path / "0", params)[0]["notes"]
    assert not any("stood for test" in note or "stands for test" in note for note in notes)
    folder(source, {"a": 3, "b": 3}, "test")
    notes = images_from(source, tmp_path / "1", params)[0]["notes"]
    assert notes[0].startswith("val of the source stood for test before, and test has labels now: its 6 images")
    assert "the 8 of val are validation images" in notes[0]
    assert images_from(source, tmp_path / "2", params)[0]["notes"] == notes[1:]
    shutil.rmtree(source / "test")
    notes = images_from(source, tmp_path / "3", params)[0]["notes"]
    assert notes[0].startswith("val of the source stands for test now, as test has no labels: its 8 images are test")


def test_files_that_are_mended_are_read_again(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"ant": 10, "bee": 10})
    sound = {path: path.read_bytes() for path in sorted((source / "train" / "ant").iterdir())[:5]}
    for path, data in sound.items():
        path.write_bytes(b"x" * len(data))
        os.utime(path, ns=(1, 1))
    settings = data_params(params, source, max_unreadable_share=0.01)
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    with pytest.raises(LgpError, match="5 of 20 files"):
        prepare(settings, 0, tmp_path / "out", tmp_path / "none.csv", tmp_path / "work")
    for path, data in sound.items():
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
    metrics, _ = prepare(settings, 0, tmp_path / "out", tmp_path / "none.csv", tmp_path / "work")
    assert metrics["unreadable"] == []


def test_group_of_two_given_parts_is_refused(tmp_path: Path, params: Params) -> None:
    (tmp_path / "raw").mkdir()
    for i in range(4):
        (tmp_path / "raw" / f"{i}.png").write_bytes(png())
    rows = ["0.png,a,train,p", "1.png,b,train,q", "2.png,a,test,p", "3.png,b,test,r"]
    (tmp_path / "raw" / "t.csv").write_text("\n".join(["path,label,split,group", *rows]))
    with pytest.raises(LgpError, match=r"1 groups have images in several parts, as p \(test, train\)"):
        images_from(tmp_path / "raw" / "t.csv", tmp_path / "prepared", params)


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
    assert sorted(file.name for file in one.folder.iterdir()) == [
        "digests.json",
        "images.npy", "index.parquet", "meta.json", "skipped.csv", "source_state",
    ]  # fmt: skip
    assert (one.folder / "images.npy").read_bytes() == (other.folder / "images.npy").read_bytes()
    assert list(one.index) == ["height", "width", "content", "hash", "path", "group", "row", "part"]
    assert one.index.drop(columns="part").equals(other.index.drop(columns="part"))
    assert set(one.meta) == {"image_size", "channels", "eval_crop", "mean", "std", "digest"}


@pytest.mark.parametrize("capped", [None, 10])
def test_source_without_an_image_is_an_error(tmp_path: Path, params: Params, capped: int | None) -> None:
    source = folder(tmp_path / "source", {"a": 0, "b": 0})
    with pytest.raises(LgpError, match="the data source holds no image at all"):
        images_from(source, tmp_path / "prepared", params, max_train_images=capped)


def test_class_that_only_test_has_is_named(tmp_path: Path, params: Params) -> None:
    source = folder(folder(tmp_path / "source", {"a": 5, "b": 5}), {"a": 2, "c": 2}, "test")
    with pytest.raises(LgpError, match="test has classes that train lacks: c"):
        images_from(source, tmp_path / "prepared", params)


def test_source_of_which_nothing_can_be_opened_says_why(tmp_path: Path, params: Params) -> None:
    (tmp_path / "t.csv").write_text("path,label\n0.png,ant\n")
    with pytest.raises(LgpError, match=r"1 of 1 files .*: 0.png \(No such file.*\); .* paths of a table start at its"):
        images_from(tmp_path / "t.csv", tmp_path / "prepared", params)


def test_files_that_a_table_names_in_vain_count_as_unreadable(tmp_path: Path, params: Params) -> None:
    folder(tmp_path, {"ant": 10, "bee": 10}, "images")
    rows = [f"images/{name}/{i}.png,{name}" for name in ("ant", "bee") for i in range(16)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    with pytest.raises(LgpError, match=r"12 of 32 files .* cannot be read, 37.5%"):
        images_from(tmp_path / "t.csv", tmp_path / "one", params)
    metrics, images = images_from(tmp_path / "t.csv", tmp_path / "two", params, max_unreadable_share=0.4)
    assert (len(images.paths), len(metrics["unreadable"])) == (20, 12)


@pytest.mark.parametrize("sample", [10_000, 12])
def test_statistics_are_those_of_the_training_images(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, sample: int
) -> None:
    """Of few images, sums are taken as they are decoded. Of many, stored ones are decoded again, in processes."""
    monkeypatch.setattr(statistics, "CHUNK", 5)
    monkeypatch.setattr(statistics, "SAMPLE", sample)
    again = []
    monkeypatch.setattr(preparation, "of_stored", lambda images: again.append(1) or statistics.of_stored(images))
    source = folder(tmp_path / "source", {"ant": 12, "bee": 12}, size=(9, 11))
    metrics, images = images_from(source, tmp_path / "out", params, eval_crop=0.875)
    assert bool(again) == (sample == 12)
    assert metrics["images/train"] > 10
    assert not (images.folder / ARRAY).exists()
    pixels = images.whole(images.pretraining_ids).double() / 255
    assert images.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert images.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


@pytest.mark.parametrize("changes", [{}, {"eval_crop": 0.5}, {"store_short_side": 8}, {"storage": "reference"}])
def test_statistics_of_the_first_decoding_are_those_of_stored_images(
    tmp_path: Path, params: Params, changes: dict[str, Any]
) -> None:
    source = folder(tmp_path / "source", {"ant": 12, "bee": 12}, size=(9, 13))
    _, images = images_from(source, tmp_path / "out", params, **changes)
    assert (images.mean, images.std) == statistics.of_stored(images)


def test_what_the_sources_say_is_told(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "source", {"ant": 10, "bee": 10})
    opened = preparation.open_sources
    monkeypatch.setattr(preparation, "open_sources", lambda *given: replace(opened(*given), notes=["a word"]))
    metrics, _ = images_from(source, tmp_path / "prepared", params)
    assert metrics["notes"][0] == "a word"
