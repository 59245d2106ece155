"""Parquet and Arrow files as people have them, whole and damaged."""

import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from made_files import IMAGE, arrow, class_names, image_rows, image_table, numbers, parquet, png, reason_of

from lgp.data.sources.offers import Columns, Offers
from lgp.data.sources.tables import arrow_source, hub_source, is_image_table, parquet_source
from lgp.errors import LgpError

ANY = Columns()


def opened(root: Path, columns: Columns = ANY) -> Offers:
    return parquet_source(root, sorted(root.rglob("*.parquet")), columns)


def test_the_hubs_layout_is_listed_and_read(tmp_path: Path) -> None:
    parquet(tmp_path / "data/train-00000-of-00002.parquet", image_table([1, 0, None], class_names(["cat", "dog"])))
    parquet(tmp_path / "data/train-00001-of-00002.parquet", image_table([-1, 1], class_names(["cat", "dog"]), 10))
    parquet(tmp_path / "data/validation-00000-of-00001.parquet", image_table([0], class_names(["cat", "dog"]), 20))
    offers = opened(tmp_path)
    assert offers.labels == ["dog", "cat", None, None, "dog", "cat"]
    assert offers.splits == ["train"] * 5 + ["val"]
    assert offers.paths[3] == "data/train-00001-of-00002.parquet#0"
    assert (offers.classes, offers.declared, offers.skipped) == (["cat", "dog"], True, [])
    assert numbers(offers) == [0, 1, 2, 10, 11, 20]
    assert len(set(offers.paths)) == len(set(offers.states)) == 6


def test_wanted_rows_alone_are_read_across_row_groups_and_batches(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", image_table([0] * 200), row_group_size=90)
    parquet(tmp_path / "b.parquet", image_table([0] * 5, start=200))
    wanted = [0, 63, 64, 89, 90, 179, 180, 199, 203]
    reads = [pickle.loads(pickle.dumps(read)) for read in opened(tmp_path).reads(wanted)]
    assert [read() for read in reads] == [png(i) for i in wanted]
    assert list(opened(tmp_path).reads([])) == []


def test_listing_reads_no_image(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", image_table([0, 1] * 50), compression=None)
    data = path.read_bytes()
    first, last = data.index(png(0)), data.rindex(png(99))
    path.write_bytes(data[:first] + bytes(last - first) + data[last:])
    assert opened(tmp_path).labels == ["0", "1"] * 50


def test_class_names_in_another_order_are_mapped_by_name(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", image_table([0, 1], class_names(["cat", "dog"])))
    parquet(tmp_path / "test.parquet", image_table([0, 1, 2], class_names(["dog", "cat", "ant"])))
    offers = opened(tmp_path)
    assert offers.labels == ["dog", "cat", "ant", "cat", "dog"]
    assert offers.splits == ["test"] * 3 + ["train"] * 2
    assert offers.classes == ["dog", "cat", "ant"]


@pytest.mark.parametrize(
    "metadata",
    [
        "{not json",
        "[]",
        "null",
        '{"info": null}',
        '{"info": {"features": null}}',
        '{"info": {"features": {"label": "int64"}}}',
        '{"info": {"features": {"label": {"names": {"0": "cat"}}}}}',
        '{"info": {"features": {"label": {"names": [1, 2]}}}}',
    ],
)
def test_damaged_metadata_names_nothing(tmp_path: Path, metadata: str) -> None:
    parquet(tmp_path / "train.parquet", image_table([10, 9, 10], metadata))
    offers = opened(tmp_path)
    assert (offers.classes, offers.declared) == (["9", "10"], False)


def test_numbers_without_names_take_the_names_on_which_the_others_agree(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", image_table([0], class_names(["cat", "dog"])))
    parquet(tmp_path / "train-1.parquet", image_table([1]))
    assert opened(tmp_path).labels == ["cat", "dog"]
    parquet(tmp_path / "train-2.parquet", image_table([1], class_names(["dog", "cat"])))
    with pytest.raises(LgpError, match=r"train-1\.parquet numbers its classes"):
        opened(tmp_path)


def test_a_label_outside_the_names_is_refused_with_its_row(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", image_table([0, 1, 2], class_names(["cat", "dog"])))
    with pytest.raises(LgpError, match=r"train\.parquet: row 2 has the label 2, but the class names are 0 to 1"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["cat", "", None, "-1", "ant"], ["cat", None, None, None, "ant"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([1.0, 2.0, None, float("nan"), -1.0]), ["1", "2", None, None, None]),
        (pa.array([True, False]), ["True", "False"]),
        (pa.array([3, 200], pa.uint8()), ["3", "200"]),
        (pa.array([b"cat", b"\xff"]), ["cat", "\\xff"]),
        (pa.nulls(2), [None, None]),
    ],
)
def test_labels_of_many_types(tmp_path: Path, labels: Any, expected: list[str | None]) -> None:
    parquet(tmp_path / "train.parquet", image_table(labels))
    assert opened(tmp_path).labels == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1], [2]], r"train\.parquet: row 0 has the label \[0, 1\]: several labels"),
        ([1.0, 0.5], r"row 1 has the label 0\.5: a number that is not whole"),
        ([{"x": 1}], "several labels"),
        (pa.array([1, 2], pa.timestamp("s")), "type datetime"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, labels: Any, message: str) -> None:
    parquet(tmp_path / "train.parquet", image_table(labels))
    with pytest.raises(LgpError, match=message):
        opened(tmp_path)


def test_unlabelled_files_and_hidden_labels(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", image_table([0, 1]))
    parquet(tmp_path / "unlabelled.parquet", image_table([[0], [1]]))
    parquet(tmp_path / "test.parquet", pa.table({"image": image_rows(2)}))
    offers = opened(tmp_path)
    assert offers.labels == [None, None, "0", "1", None, None]
    assert offers.splits == ["test"] * 2 + ["train"] * 4


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Train-0.parquet", "train"),
        ("imagenet_valid_3.parquet", "val"),
        ("default/test/0000.parquet", "test"),
        ("testing/x/0000.parquet", "test"),
        ("trained/contest.parquet", "train"),
        ("0000.parquet", "train"),
    ],
)
def test_the_split_is_a_word_of_the_files_name_or_folders(tmp_path: Path, name: str, split: str) -> None:
    parquet(tmp_path / name, image_table([0]))
    assert opened(tmp_path).splits == [split]


def test_a_column_of_splits_goes_before_the_name(tmp_path: Path) -> None:
    splits = ["train", "Validation", None, "unlabeled", "TEST"]
    parquet(tmp_path / "test.parquet", image_table([0, 1, 2, 3, 4], split=splits))
    offers = opened(tmp_path)
    assert offers.splits == ["train", "val", "test", "train", "test"]
    assert offers.labels == ["0", "1", "2", None, "4"]


def test_other_words_in_a_column_of_splits(tmp_path: Path) -> None:
    parquet(tmp_path / "test.parquet", image_table([0, 1], part=["wing", "tail"]))
    assert opened(tmp_path).splits == ["test", "test"]
    for columns, given in ((Columns(split="part"), "part"), (ANY, "split")):
        parquet(tmp_path / "test.parquet", image_table([0, 1]).append_column(given, [["train", "fold3"]]))
        with pytest.raises(LgpError, match=r"row 1 has the split 'fold3': valid are train"):
            opened(tmp_path, columns)


def test_given_and_usual_columns(tmp_path: Path) -> None:
    table = pa.table({"img": [png(7)], "photo": [png(8)], "fine_label": [3], "coarse": ["x"], "patient": [12]})
    parquet(tmp_path / "train.parquet", table)
    usual = opened(tmp_path)
    assert (usual.labels, usual.groups, numbers(usual)) == (["3"], ["12"], [7])
    given = opened(tmp_path, Columns(image="photo", label="coarse"))
    assert (given.labels, numbers(given)) == (["x"], [8])
    with pytest.raises(LgpError, match="no table has the column 'nose', given for label: there are img, photo"):
        opened(tmp_path, Columns(label="nose"))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([png(5)], pa.large_binary()),
        pa.array([{"bytes": png(5)}]),
        pa.array([list(png(5))], pa.list_(pa.uint8())),
        pa.array([{"bytes": png(5), "path": "/pictures/cat.png"}], IMAGE),
    ],
)
def test_images_of_many_types(tmp_path: Path, column: Any) -> None:
    parquet(tmp_path / "train.parquet", pa.table({"image": column}))
    assert numbers(opened(tmp_path)) == [5]


def test_lists_of_lists_are_pixels(tmp_path: Path) -> None:
    pixels = np.arange(24).reshape(2, 4, 3)
    parquet(tmp_path / "train.parquet", pa.table({"image": [pixels.tolist(), (pixels * 100).tolist()]}))
    (read,) = opened(tmp_path).reads([0])
    assert np.array_equal(read(), pixels)
    assert "not whole ones from 0 to 255" in reason_of(opened(tmp_path), 1)


@pytest.mark.parametrize("form", ["text", "struct", "path only"])
def test_images_by_path_are_read_and_never_outside_the_source(tmp_path: Path, form: str) -> None:
    root = tmp_path / "source"
    (root / "data").mkdir(parents=True)
    (root / "data/x.png").write_bytes(png(4))
    (root / "y.png").write_bytes(png(5))
    (tmp_path / "secret.png").write_bytes(png(6))
    secret = str(tmp_path / "secret.png")
    paths = ["x.png", "../y.png", "../../secret.png", secret, "none.png", None, "x\0.png"]
    column = {
        "text": pa.array(paths),
        "struct": pa.array([{"bytes": None, "path": p} for p in paths], IMAGE),
        "path only": pa.array([{"path": p} for p in paths]),
    }[form]
    parquet(root / "data/train.parquet", pa.table({"image": column, "label": list("abcdefg")}))
    offers = opened(root)
    assert [s.path for s in offers.skipped] == ["data/train.parquet#2", "data/train.parquet#3"]
    assert all("leads out of the source" in s.reason for s in offers.skipped)
    assert offers.labels == ["a", "b", "e", "f", "g"]
    assert [read() for read in offers.reads([0, 1])] == [png(4), png(5)]
    assert reason_of(offers, 2).startswith("FileNotFoundError: ")
    assert "no image in this row" in reason_of(offers, 3)
    assert "null" in reason_of(offers, 4)
    before = offers.states[0]
    (root / "data/x.png").write_bytes(png(40, size=9))
    assert opened(root).states[0] != before


def test_a_row_that_alone_has_a_path_never_leads_outside(tmp_path: Path) -> None:
    rows = [{"bytes": png(1), "path": "/etc/passwd"}, {"bytes": None, "path": "/etc/passwd"}, None]
    parquet(tmp_path / "train.parquet", pa.table({"image": pa.array(rows, IMAGE)}))
    offers = opened(tmp_path)
    assert len(offers) == 3
    assert "leads out of the source" in reason_of(offers, 1)
    assert "no image in this row" in reason_of(offers, 2)


def test_two_configurations_are_refused_and_one_is_taken(tmp_path: Path) -> None:
    for name in ("plain/train/0000", "plain/test/0000", "masked/train/0000"):
        parquet(tmp_path / f"{name}.parquet", image_table([0]))
    with pytest.raises(LgpError, match=r"in the folders masked, plain: .* Give one of them .*/plain$"):
        opened(tmp_path)
    assert opened(tmp_path / "plain").splits == ["test", "train"]


def test_hidden_files_are_clutter(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", image_table([0]))
    (tmp_path / "._train.parquet").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/huggingface/x.parquet").write_bytes(b"")
    offers = opened(tmp_path)
    assert len(offers) == 1
    assert sorted(c.path for c in offers.clutter) == ["._train.parquet", ".cache/huggingface/x.parquet"]


def test_tables_without_images_are_listed_and_told_from_tables_of_images(tmp_path: Path) -> None:
    images = parquet(tmp_path / "train.parquet", image_table([0]))
    other = parquet(tmp_path / "extra.parquet", pa.table({"area": [1.5]}))
    ids = parquet(tmp_path / "ids.parquet", pa.table({"file_name": ["a"]}))
    (tmp_path / "a.png").write_bytes(png())
    paths = parquet(tmp_path / "paths.parquet", pa.table({"file_name": ["a.png"]}))
    metadata = parquet(tmp_path / "metadata.parquet", pa.table({"file_name": ["a.png"]}))
    assert [is_image_table(p, ANY) for p in (images, other, ids, paths, metadata)] == [True, False, False, True, False]
    offers = parquet_source(tmp_path, [other, images], ANY)
    assert [s.path for s in offers.skipped] == ["extra.parquet"]
    with pytest.raises(LgpError, match=r"extra\.parquet is without a column of images; its columns are area"):
        parquet_source(tmp_path, [other], ANY)


@pytest.mark.parametrize("content", [b"", b"no table at all", b"PAR1\0\0\0\0PAR1"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(LgpError, match=r"train\.parquet cannot be read as Parquet"):
        opened(tmp_path)


def test_a_damaged_row_group_loses_its_own_rows_alone(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", image_table([0] * 9), row_group_size=3, compression="gzip")
    data = bytearray(path.read_bytes())
    import pyarrow.parquet as pq

    column = pq.read_metadata(path).row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    offers = opened(tmp_path)
    reads = list(offers.reads(range(9)))
    assert [reads[i]() for i in (0, 1, 2, 6, 7, 8)] == [png(i) for i in (0, 1, 2, 6, 7, 8)]
    assert "its part of the table is damaged" in reason_of(offers, 4)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_file_whose_column_is_damaged_is_named(tmp_path: Path, suffix: str) -> None:
    write = {"parquet": parquet, "arrow": arrow}[suffix]
    file = tmp_path / f"t.{suffix}"
    write(file, pa.table({"path": ["é.png"] * 9, "label": ["a"] * 9}))
    content = file.read_bytes()
    file.write_bytes(content.replace("é.png".encode(), b"\xff\xff.png"))
    assert file.read_bytes() != content
    with pytest.raises(LgpError, match=rf"t.{suffix} cannot be read as (Parquet|Arrow): .*UTF"):
        is_image_table(file, ANY)
    file.write_bytes(content[:4] + b"\xff" * 9 + content[13:])
    if suffix == "parquet":
        with pytest.raises(LgpError, match=r"t.parquet cannot be read as Parquet: .*; mend or remove it"):
            is_image_table(file, ANY)


def test_one_of_two_columns_of_one_name_is_not_guessed(tmp_path: Path) -> None:
    table = pa.table([image_rows(1), pa.array([0]), pa.array([1])], names=["image", "label", "label"])
    parquet(tmp_path / "train.parquet", table)
    with pytest.raises(LgpError, match="several columns 'label'"):
        opened(tmp_path)


def test_a_single_file_is_a_source(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", image_table([0]))
    assert parquet_source(path, [path], ANY).paths == ["train.parquet#0"]


def saved(folder: Path, table: pa.Table, files: int = 2, **state: Any) -> Path:
    """Write a folder as `save_to_disk` does."""
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        arrow(folder / name, table.slice(i * len(table) // files, len(table) // files))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names], **state}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"label": {"names": ["cat", "dog"]}}}))
    return folder


def test_a_saved_dataset_dict(tmp_path: Path) -> None:
    saved(tmp_path / "train", image_table([0, 1, None, 1], class_names(["cat", "dog"])))
    saved(tmp_path / "validation", image_table([1, 0], start=10), files=1)
    arrow(tmp_path / "train/cache-0123.arrow", image_table([0]))
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    offers = arrow_source(tmp_path, ANY)
    assert offers.labels == ["cat", "dog", None, "dog", "dog", "cat"]
    assert offers.splits == ["train"] * 4 + ["val"] * 2
    assert offers.paths[2] == "train/data-00001-of-00002.arrow#0"
    assert numbers(offers) == [0, 1, 2, 3, 10, 11]
    assert [s.path for s in offers.skipped] == ["train/cache-0123.arrow"]


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = saved(tmp_path / "mine", image_table([0, 1]))
    assert arrow_source(folder, ANY).labels == ["cat", "dog"]
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(LgpError, match=r"names the file data-00001-of-00002\.arrow, which .*mine lacks"):
        arrow_source(folder, ANY)
    (folder / "state.json").write_text("{")
    assert arrow_source(folder, ANY).labels == ["cat"]


def test_a_saved_dataset_names_no_file_outside_it(tmp_path: Path) -> None:
    arrow(tmp_path / "secret.arrow", image_table([0]))
    folder = saved(tmp_path / "mine", image_table([0, 1]))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(LgpError, match=r"names the file \.\./secret\.arrow"):
        arrow_source(folder, ANY)


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("options", [None, pa.ipc.IpcWriteOptions(compression="zstd")])
def test_arrow_files_of_both_formats(tmp_path: Path, new: Any, options: Any) -> None:
    path = tmp_path / "mnist-test.arrow"
    table = image_table([1, 0] * 5, class_names(["cat", "dog"]), split=[None] * 10)
    arrow(path, table, lambda name, schema: new(name, schema, options=options))
    for root in (path, tmp_path):
        offers = arrow_source(root, ANY)
        assert offers.labels == ["dog", "cat"] * 5
        assert set(offers.splits) == {"test"}
        assert [read() for read in offers.reads([2, 3, 9])] == [png(2), png(3), png(9)]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_a_damaged_arrow_file_is_named(tmp_path: Path, new: Any) -> None:
    path = arrow(tmp_path / "train.arrow", image_table([0] * 9), new)
    whole = path.read_bytes()
    for damaged in (b"", b"no table", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(LgpError, match=r"train\.arrow cannot be read as Arrow"):
            arrow_source(tmp_path, ANY)


def test_arrow_images_by_path(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(3))
    column = pa.array([{"bytes": None, "path": p} for p in ("x.png", "/etc/passwd")], IMAGE)
    arrow(tmp_path / "train.arrow", pa.table({"image": column, "label": [1, 2]}))
    offers = arrow_source(tmp_path, ANY)
    assert (offers.labels, numbers(offers)) == (["1"], [3])
    assert [s.path for s in offers.skipped] == ["train.arrow#1"]


def test_the_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LgpError, match=r"hf:mnist needs the library `datasets`: pip install 'lgp\[hub\]'"):
        hub_source("mnist", ANY)


def test_what_the_hubs_library_stores_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    train = arrow(tmp_path / "hub/mnist-train.arrow", image_table([1, 0], class_names(["cat", "dog"])))
    test = arrow(tmp_path / "hub/mnist-holdout.arrow", image_table([1]))

    def load_dataset(name: str, configuration: str | None) -> dict[str, Any]:
        asked.append((name, configuration))
        parts = {"train": train, "validation": test}
        return {split: SimpleNamespace(cache_files=[{"filename": str(file)}]) for split, file in parts.items()}

    config = SimpleNamespace(HF_CACHE_HOME=str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=config))
    offers = hub_source("me/mnist:plain", ANY)
    assert asked == [("me/mnist", "plain")]
    assert offers.paths == [
        "train/mnist-train.arrow#0",
        "train/mnist-train.arrow#1",
        "validation/mnist-holdout.arrow#0",
    ]
    assert (offers.labels, offers.splits) == (["dog", "cat", "dog"], ["train", "train", "val"])
    assert numbers(offers) == [0, 1, 0]


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None) -> None:
        raise ConnectionError(f"Couldn't reach\n{name}")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(LgpError, match=r"hf:mnist cannot be loaded: Couldn't reach mnist; check the name"):
        hub_source("mnist", ANY)


def test_the_library_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    parquet(tmp_path / "hub/data/train-00000-of-00001.parquet", image_table([0, 1], class_names(["cat", "dog"])))
    parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", image_table([1], class_names(["cat", "dog"]), 5))
    datasets.load_dataset(str(tmp_path / "hub")).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    for offers in (hub_source(str(tmp_path / "hub"), ANY), arrow_source(tmp_path / "saved", ANY)):
        assert (offers.labels, offers.splits) == (["cat", "dog", "dog"], ["train", "train", "test"])
        assert (offers.classes, offers.declared, offers.skipped) == (["cat", "dog"], True, [])
        assert numbers(offers) == [0, 1, 5]
