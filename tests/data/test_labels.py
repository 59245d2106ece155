"""Labels apart from images: what they change, what they leave, and what is refused."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_files import zip_archive
from made_sources import both_from, folder, images_from, labels_from, png, write_parquet

from lgp.data.conversion import encode
from lgp.data.labels import LabelledImages, describe, write_labels
from lgp.data.sources.opening import open_sources
from lgp.data.sources.states import STATE, labelling_state
from lgp.data.storage import Images
from lgp.data.subset_files import load_subsets, names_of_same_subsets
from lgp.errors import LgpError
from lgp.params.file import Params
from lgp.params.labels import LabelsParams

SPLITS = ("train", "unlabeled", "val", "test")
PARTS = ("test", "val")


def state_of(source: Path | str, lists: list[str]) -> str:
    return labelling_state(open_sources([str(source)]), lists)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def listed(tmp_path: Path, *names: str) -> dict[str, Any]:
    """Publish a list named official of these images."""
    (tmp_path / "list.txt").write_text("\n".join(names))
    return {"lists": {"official": str(tmp_path / "list.txt")}}


def test_splits_and_subsets_are_those_of_the_metrics(prepared: LabelledImages, params: Params, tmp_path: Path) -> None:
    metrics = write_labels(params.labels, params.data, Images(prepared.folder), params.seed, tmp_path)
    assert [metrics[f"images/{s}"] for s in SPLITS] == [len(prepared.ids(s)) for s in SPLITS]
    assert metrics["images/dropped"] == 0
    assert metrics["classes"] == len(prepared.classes) == 10
    assert [metrics[f"labels/{name}"] for name in ("1pct", "10pct")] == [10, 20]
    assert metrics["digest"] == prepared.labels_meta["digest"]


def test_settings_of_labels_change_labels_and_no_byte_of_the_images(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"a": 20, "b": 20})
    _, images = images_from(source, tmp_path / "images", params)
    before, digests = contents(images.folder), []
    train = sorted(np.array(images.paths)[images.ids("train")])
    official = listed(tmp_path, train[0], train[-1])
    for number, changes in enumerate(({}, {"shares": {"1pct": 0.2}}, {"shots": [2]}, official, {"subsets": 6})):
        metrics, data = labels_from(source, images, tmp_path / f"labels{number}", params, **changes)
        digests.append(metrics["digest"])
        assert data.meta["digest"] == images.meta["digest"]
    assert len(set(digests)) == 5
    assert contents(images.folder) == before


def test_same_seed_gives_the_same_bytes_and_another_other_subsets(
    prepared: LabelledImages, params: Params, tmp_path: Path
) -> None:
    settings = LabelsParams(shares={"10pct": 0.1}, subsets=5)
    of_seed = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        out.mkdir()
        write_labels(settings, params.data, Images(prepared.folder), seed, out)
        of_seed.append(contents(out))
    assert of_seed[0] == of_seed[1]
    assert of_seed[0]["labels.parquet"] == of_seed[2]["labels.parquet"]
    assert of_seed[0]["subsets.json"] != of_seed[2]["subsets.json"]


@pytest.mark.parametrize("part", ["train", "val"])
def test_label_changed_in_the_source_changes_labels_alone(tmp_path: Path, params: Params, part: str) -> None:
    pictures, labels = [png() for _ in range(24)], [0, 1] * 12
    hub = tmp_path / "hub"
    hub.mkdir()
    write_parquet(hub / "train.parquet", labels, ["cat", "dog"], images=pictures)
    _, images = images_from(hub, tmp_path / "images", params)
    before, state = contents(images.folder), state_of(hub, [])
    first, old = labels_from(hub, images, tmp_path / "old", params)
    changed = int(images.paths[images.ids(part)[0]].split("#")[1])
    labels[changed] = 1 - labels[changed]
    write_parquet(hub / "train.parquet", labels, ["cat", "dog"], images=pictures)
    assert state_of(hub, []) != state
    _, again = images_from(hub, tmp_path / "again", params)  # the file of the labels is that of the images
    second, new = labels_from(hub, again, tmp_path / "new", params)
    assert first["digest"] != second["digest"]
    assert np.flatnonzero(old.labels != new.labels).tolist() == [images.ids(part)[0]]
    assert old.meta["digest"] == new.meta["digest"]
    assert contents(again.folder) | {STATE: b""} == before | {STATE: b""}


def test_label_taken_away_leaves_the_image_to_pretraining_or_drops_it(tmp_path: Path, params: Params) -> None:
    pictures, labels = [png() for _ in range(24)], [0, 1] * 12
    hub = tmp_path / "hub"
    hub.mkdir()
    write_parquet(hub / "train.parquet", labels, ["cat", "dog"], images=pictures)
    _, images = images_from(hub, tmp_path / "images", params)
    chosen = {part: int(images.ids(part)[0]) for part in ("train", "val", "test")}
    without = [
        None if i in [int(images.paths[c].split("#")[1]) for c in chosen.values()] else label
        for i, label in enumerate(labels)
    ]
    write_parquet(hub / "train.parquet", without, ["cat", "dog"], images=pictures)
    metrics, data = labels_from(hub, images_from(hub, tmp_path / "again", params)[1], tmp_path / "labels", params)
    assert data.ids("unlabeled").tolist() == [chosen["train"]]
    assert metrics["images/dropped"] == 2
    assert not {chosen["val"], chosen["test"]} & {i for split in SPLITS for i in data.ids(split).tolist()}
    assert data.pretraining_ids.tolist() == images.pretraining_ids.tolist()


def test_each_parquet_row_has_its_own_label_where_files_of_two_folders_share_a_name(
    tmp_path: Path, params: Params
) -> None:
    hub = tmp_path / "hub"
    for split in ("train", "test"):
        (hub / split).mkdir(parents=True)
    write_parquet(hub / "train" / "0000.parquet", [0, 1] * 8, ["cat", "dog"])
    write_parquet(hub / "test" / "0000.parquet", [1, 0] * 8, ["cat", "dog"])
    _, data = both_from(hub, tmp_path, params)
    rows = np.array([int(path.split("#")[1]) for path in data.paths])
    of_test = np.isin(np.arange(32), data.ids("test"))
    assert data.labels.tolist() == np.where(of_test, (rows + 1) % 2, rows % 2).tolist()


def test_labels_of_other_images_are_refused(prepared: LabelledImages, params: Params, tmp_path: Path) -> None:
    _, other = both_from(folder(tmp_path / "source", {"a": 9, "b": 9}), tmp_path, params)
    with pytest.raises(LgpError, match=r"are of other images than those in .*: run `lgp labels` again"):
        LabelledImages(prepared.folder, tmp_path / "labels")
    with pytest.raises(LgpError, match=r"no labels in .*: run `lgp labels` first"):
        LabelledImages(other.folder, tmp_path / "nowhere")
    with pytest.raises(LgpError, match=r"no prepared images in .*: run `lgp prepare` first"):
        LabelledImages(tmp_path / "nowhere", tmp_path / "labels")


def test_image_that_left_the_source_is_named(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"a": 9, "b": 9})
    _, images = images_from(source, tmp_path / "images", params)
    (source / "train" / "b" / "4.png").unlink()
    with pytest.raises(LgpError, match=r"no train/b/4\.png any more: run `lgp prepare`"):
        labels_from(source, images, tmp_path / "one", params)
    shutil.rmtree(source / "train" / "b")
    with pytest.raises(LgpError, match=r"no train/b/\d\.png any more, nor 8 other prepared images: run"):
        labels_from(source, images, tmp_path / "many", params)


def write_npz(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    np.savez(path / "set.npz", images=pixels, labels=labels)


def write_rows(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    images = [encode(image) for image in pixels]
    write_parquet(path / "train.parquet", labels.tolist(), ["a", "b", "c"], images=images)


def write_zip(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    files = {f"{'abc'[label]}/{i}.png": encode(pixels[i]) for i, label in enumerate(sorted(labels.tolist()))}
    zip_archive(path / "set.zip", files)


def write_files(path: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    for i, image in enumerate(pixels):
        (path / f"{'abc'[i % 3]}").mkdir(exist_ok=True)
        (path / f"{'abc'[i % 3]}" / f"{i}.png").write_bytes(encode(image))


@pytest.mark.parametrize(
    ("write", "name"), [(write_npz, "set.npz"), (write_rows, ""), (write_zip, "set.zip"), (write_files, "")]
)
def test_other_images_of_the_same_names_are_refused(tmp_path: Path, params: Params, write: Any, name: str) -> None:
    source, rng = tmp_path / "source", np.random.default_rng(0)
    source.mkdir()
    pixels, labels = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8), np.arange(30) % 3
    write(source, pixels, labels)
    _, images = images_from(source / name, tmp_path / "images", params)
    labels_from(source / name, images, tmp_path / "first", params)
    order = rng.permutation(30)
    write(source, pixels[order], labels[order])
    with pytest.raises(LgpError, match=r"the source has changed since .* run `lgp prepare` first"):
        labels_from(source / name, images, tmp_path / "second", params)


def tabled(tmp_path: Path, labels: Sequence[str | None]) -> list[str]:
    """Write a flat folder of images, and a table of their labels."""
    raw = tmp_path / "raw"
    raw.mkdir(exist_ok=True)
    for i in range(len(labels)):
        if not (raw / f"{i}.png").exists():
            (raw / f"{i}.png").write_bytes(png())
    rows = [f"{i}.png,{label or ''}" for i, label in enumerate(labels)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    return [str(raw), str(tmp_path / "t.csv")]


def test_labels_that_arrive_need_no_new_images_except_the_first(tmp_path: Path, params: Params) -> None:
    source = tabled(tmp_path, ["a", "b"] * 10 + [None] * 10)
    _, images = images_from(source, tmp_path / "images", params)
    before = contents(images.folder)
    labels_from(source, images, tmp_path / "first", params)
    tabled(tmp_path, ["a", "b"] * 10 + ["a", "b", "c"] * 3 + [None])
    metrics, _ = labels_from(source, images, tmp_path / "second", params)
    assert metrics["images/unlabeled"] == 1
    assert metrics["notes"] == []
    assert contents(images.folder) == before
    tabled(tmp_path, [None] * 30)
    _, images = images_from(source, tmp_path / "unlabelled", params)
    labels_from(source, images, tmp_path / "none", params)
    tabled(tmp_path, ["a", "b"] * 15)
    with pytest.raises(LgpError, match=r"the first labels, from which on images can be held out.* `lgp prepare` first"):
        labels_from(source, images, tmp_path / "all", params)


def test_images_of_classes_that_training_lost_are_told(tmp_path: Path, params: Params) -> None:
    labels = ["a", "b", "c"] * 20
    source = tabled(tmp_path, labels)
    _, images = images_from(source, tmp_path / "images", params)
    held = {int(Path(images.paths[i]).stem) for part in ("val", "test") for i in images.ids(part)}
    tabled(tmp_path, ["b" if label == "c" and i not in held else label for i, label in enumerate(labels)])
    metrics, _ = labels_from(source, images, tmp_path / "labels", params)
    lost = {part: sum(labels[int(Path(images.paths[i]).stem)] == "c" for i in images.ids(part)) for part in PARTS}
    assert min(lost.values()) > 0
    assert metrics["notes"] == [
        f"{lost[part]} images of {part} are not used: no training image has their class (c)" for part in PARTS
    ]
    assert describe(metrics, params.labels)[1:3] == metrics["notes"]
    assert metrics["images/dropped"] == sum(lost.values())


def test_given_part_of_a_class_that_training_lost_is_refused(tmp_path: Path, params: Params) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(30):
        (raw / f"{i}.png").write_bytes(png())

    def table(lost: str) -> None:
        rows = [
            f"{i}.png,{lost if i % 3 == 2 and i < 24 else 'abc'[i % 3]},{'train' if i < 24 else 'test'}"
            for i in range(30)
        ]
        (raw / "labels.csv").write_text("\n".join(["path,label,split", *rows]))

    table("c")
    _, images = images_from(raw, tmp_path / "images", params)
    table("b")
    with pytest.raises(LgpError, match="test has classes that train lacks: c; rename or remove them"):
        labels_from(raw, images, tmp_path / "labels", params)


def test_unknown_name_of_labels_names_those_there_are(prepared: LabelledImages) -> None:
    with pytest.raises(LgpError, match=r"no few-label subsets '5pct': there are 1pct, 10pct; add it to labels\.shares"):
        prepared.subsets("5pct")


def test_all_labels_are_a_single_subset(prepared: LabelledImages) -> None:
    (everything,) = prepared.labelled("all")
    assert everything.tolist() == prepared.ids("train").tolist()
    assert [s.tolist() for s in prepared.labelled("1pct")] == [s.tolist() for s in prepared.subsets("1pct")]


def test_listed_images_of_val_count_as_training_images(tmp_path: Path, params: Params) -> None:
    source = folder(folder(tmp_path / "source", {"a": 20, "b": 20}), {"a": 4, "b": 4}, "test")
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(12)]
    _, images = images_from(source, tmp_path / "images", params, val_share=0.5)
    before = contents(images.folder)
    metrics, data = labels_from(source, images, tmp_path / "labels", params, **listed(tmp_path, *names))
    (subset,) = data.subsets("official")
    of_val = set(subset.tolist()) & set(images.ids("val").tolist())
    assert 0 < len(of_val) < len(images.ids("val"))
    assert sorted(np.array(data.paths)[subset]) == sorted(names)
    assert metrics["labels/official"] == 24
    assert set(subset) <= set(data.ids("train"))
    assert set(data.ids("val")) == set(images.ids("val")) - of_val
    assert set(data.pretraining_ids) == set(images.ids("train"))  # which never sees them, listed or not
    assert contents(images.folder) == before


def test_list_of_several_files_is_a_subset_each(tmp_path: Path, params: Params) -> None:
    source = folder(folder(tmp_path / "source", {"a": 9, "b": 9}), {"a": 4, "b": 4}, "test")
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(
            f"a/{number}.png\nb/{number}.png".replace("a/", "train/a/").replace("b/", "train/b/")
        )
    _, images = images_from(source, tmp_path / "images", params)
    lists = {"official": [str(tmp_path / f"{number}.txt") for number in range(2)]}
    _, data = labels_from(source, images, tmp_path / "labels", params, lists=lists)
    paths = [sorted(data.paths[i] for i in subset) for subset in data.subsets("official")]
    assert paths == [[f"train/{c}/{number}.png" for c in "ab"] for number in range(2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test/a/1.png", r"not of the training part: test/a/1\.png \(test\)"),
        ("unlabeled/u.png", r"not of the training part: unlabeled/u\.png \(unlabeled\)"),
        ("train/a/77.png", r"unknown: train/a/77\.png"),
        ("train/a/8.png", r"unknown: train/a/8\.png"),  # damaged
    ],
)
def test_listed_image_that_is_not_for_training_is_named(
    tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    source = folder(folder(tmp_path / "source", {"a": 9, "b": 9}), {"a": 4, "b": 4}, "test")
    (source / "train" / "a" / "8.png").write_bytes(b"damaged")
    (source / "unlabeled").mkdir()
    (source / "unlabeled" / "u.png").write_bytes(png())
    _, images = images_from(source, tmp_path / "images", params)
    monkeypatch.setattr("lgp.data.stored.decode", lambda *_: pytest.fail("decoded"))
    official = listed(tmp_path, "train/a/0.png", "train/b/0.png", name)
    with pytest.raises(LgpError, match=message):
        labels_from(source, images, tmp_path / "labels", params, **official)
    assert not list((tmp_path / "labels").iterdir())


def test_listed_image_that_a_cap_left_out_is_unknown(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"a": 20, "b": 20})
    _, images = images_from(source, tmp_path / "images", params, max_train_images=20)
    gone = next(p for p in (f"train/b/{i}.png" for i in range(20)) if p not in images.paths)
    kept = np.array(images.paths)[images.ids("train")][0]
    with pytest.raises(LgpError, match=rf"unknown: {gone}"):
        labels_from(source, images, tmp_path / "labels", params, **listed(tmp_path, kept, gone))


def test_shot_that_a_class_cannot_give_is_refused(tmp_path: Path, params: Params) -> None:
    source = folder(tmp_path / "source", {"a": 20, "b": 6})
    _, images = images_from(source, tmp_path / "images", params)
    with pytest.raises(LgpError, match=r"5 images of each class, fewer are in the training part of b \(4\)"):
        labels_from(source, images, tmp_path / "labels", params, shots=[5])


def test_state_follows_labels_and_lists(tmp_path: Path) -> None:
    source = folder(tmp_path / "source", {"a": 3, "b": 3})
    lists = [str(tmp_path / "list.txt")]
    states = [state_of(source, lists)]

    def changed() -> bool:
        states.append(state_of(source, lists))
        assert states[-1] == state_of(source, lists)
        return states[-1] not in states[:-1]

    (tmp_path / "list.txt").write_text("a/0.png\n")
    assert changed()
    (tmp_path / "list.txt").write_text("a/1.png\n")
    assert changed()
    (source / "train" / "a" / "2.png").rename(source / "train" / "b" / "moved.png")
    assert changed()
    (source / "train" / "b" / "moved.png").write_bytes(png())
    assert not changed()  # another picture is no other label
    (source / "train" / "b").rename(source / "train" / "c")
    assert changed()
    assert state_of(source, []) != states[-1]


def test_state_of_digits_follows_the_lists(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("digits/0\n")
    states = [state_of("digits", []), state_of("digits", [str(tmp_path / "list.txt")])]
    (tmp_path / "list.txt").write_text("digits/1\n")
    states.append(state_of("digits", [str(tmp_path / "list.txt")]))
    assert len(set(states)) == 3


def test_description_counts_splits_and_leaks() -> None:
    counts = {"images/train": 20, "images/unlabeled": 1, "images/val": 2, "images/test": 7, "images/dropped": 3}
    counts |= {"notes": []}
    leaks = {"leaks": [{}], "leaks/exact": 1, "leaks/near": 2}
    params = LabelsParams(shares={}, subsets=5, leaks="drop_test")
    lines = describe({**counts, **leaks, "classes": 2}, params)
    assert lines[0] == "20 train, 1 unlabeled, 2 val, 7 test images in 2 classes"
    assert lines[1].startswith("1 test images also stand elsewhere, 2 nearly, dropped from test:")
    assert len(describe({**counts, **leaks, "leaks": [], "classes": 2}, params)) == 1


def test_description_names_subsets_that_are_the_same_images(
    prepared: LabelledImages, params: Params, tmp_path: Path
) -> None:
    settings = LabelsParams(shares={"1pct": 0.01, "10pct": 0.1}, shots=[1], subsets=5)
    metrics = write_labels(settings, params.data, Images(prepared.folder), 0, tmp_path)
    of_first, of_shot = load_subsets(tmp_path, "1pct"), load_subsets(tmp_path, "1shot")
    assert all(np.array_equal(a, b) for a, b in zip(of_first, of_shot, strict=True))
    assert names_of_same_subsets(tmp_path, "1shot") == ["1pct", "1shot"]
    assert names_of_same_subsets(tmp_path, "10pct") == ["10pct"]
    assert names_of_same_subsets(tmp_path, "all") == []
    assert [line for line in describe(metrics, settings) if "the same" in line] == [
        "1pct and 1shot are the same 10 images: keep one of them, or choose labels.shots"
    ]


def test_labels_on_disk_have_a_row_per_image(prepared: LabelledImages) -> None:
    table = pd.read_parquet(prepared.folder.parent / "labels" / "labels.parquet")
    assert list(table) == ["label", "split"]
    assert table["split"].tolist() == prepared.parts.tolist()
    assert table["label"].tolist() == prepared.labels.tolist()
