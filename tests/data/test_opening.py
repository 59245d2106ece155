"""From `data.source` to one list of images: layouts, several sources, states."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_sources import folder, png

from lgp.data.sources.offers import Offers
from lgp.data.sources.opening import open_sources, specified
from lgp.data.sources.states import images_state, labels_state
from lgp.errors import LgpError
from lgp.params.data import ColumnsParams, DataParams, SourceParams
from lgp.params.file import Params


def opened(*sources: Any, tables: tuple[str, ...] = ()) -> Offers:
    given = [SourceParams.model_validate(s) if isinstance(s, dict) else str(s) for s in sources]
    return open_sources(given, tables=tables)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A folder of images below folders that are no classes."""
    for name in ("2020/0.png", "2020/1.png", "2021/2.png"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(png())
    return tmp_path / "raw"


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    (tmp_path / "labels.csv").write_text("path,label\n2020/0.png,ant\n2.png,bee\n")
    return tmp_path / "labels.csv"


def test_table_behind_a_folder_labels_its_images(raw: Path, labels: Path) -> None:
    offers = opened({"folder": str(raw)}, {"csv": str(labels)})
    assert dict(zip(offers.paths, offers.labels, strict=True)) == {
        "2020/0.png": "ant", "2020/1.png": None, "2021/2.png": "bee",
    }  # fmt: skip
    assert offers.classes == ["ant", "bee"]
    assert offers.skipped == []


def test_folders_are_no_classes_before_a_table_unless_that_is_said(raw: Path, labels: Path) -> None:
    assert opened({"folder": str(raw), "class_folders": True}, {"csv": str(labels)}).labels[1] == "2020"
    folder(raw.parent / "split", {"ant": 1})
    folder(raw.parent / "split", {"ant": 1}, "test")
    offers = opened({"folder": str(raw.parent / "split")}, {"csv": str(labels)})
    assert offers.splits == ["test", "train"]
    assert set(offers.labels) == {None}
    assert [s.reason for s in offers.skipped] == ["no such file"] * 2


def test_table_before_the_images_that_it_should_label_is_an_error(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "first.csv").write_text("path,label\n2020/0.png,ant\n")
    assert len(opened({"folder": str(raw)}, {"csv": str(tmp_path / "first.csv")})) == 3
    with pytest.raises(LgpError, match="leads to no image itself, and stands before other sources: put it behind"):
        opened({"csv": str(tmp_path / "first.csv")}, {"folder": str(raw)})


def test_table_of_labels_labels_and_adds_nothing(raw: Path, labels: Path) -> None:
    offers = opened({"folder": str(raw), "class_folders": False}, tables=(str(labels),))
    assert sorted(filter(None, offers.labels)) == ["ant", "bee"]
    labels.write_text("path,label\ngone.png,ant\n")
    offers = opened({"folder": str(raw)}, tables=(str(labels),))
    assert [s.reason for s in offers.skipped] == ["names no image of the source"]
    assert len(offers) == 3


def test_table_of_labels_is_read_by_the_given_columns_if_it_has_them(raw: Path, labels: Path) -> None:
    (labels.parent / "own.csv").write_text("wherein,kind\n2.png,wasp\n")
    columns = ColumnsParams(image="wherein", label="kind")
    tables = [str(labels), str(labels.parent / "own.csv")]
    offers = open_sources([SourceParams(folder=str(raw), class_folders=False)], columns, tables)
    assert sorted(filter(None, offers.labels)) == ["ant", "wasp"]


def test_table_with_a_root_opens_its_own_images(tmp_path: Path) -> None:
    sources = []
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png())
        (tmp_path / f"{name}.csv").write_text(f"path,label\n0.png,{name}ed\n")
        sources.append({"csv": str(tmp_path / f"{name}.csv"), "root": str(tmp_path / name)})
    offers = opened(*sources)
    assert (offers.splits, offers.labels) == (["train", "test"], ["trained", "tested"])
    assert [read() for read in offers.reads([0, 1])] == [
        (tmp_path / name / "0.png").read_bytes() for name in ("train", "test")
    ]


def test_names_of_several_sources_are_their_splits(tmp_path: Path) -> None:
    for name in ("train", "validation", "test", "unlabeled"):
        folder(tmp_path / name, {"ant": 1, "bee": 1}, ".")
    offers = opened(*(tmp_path / name for name in ("train", "validation", "test", "unlabeled")))
    assert offers.splits == [split for split in ("train", "val", "test", "train") for _ in range(2)]
    assert offers.labels == ["ant", "bee"] * 3 + [None, None]


def test_parquet_of_paths_labels_the_images_before_it(raw: Path) -> None:
    pq.write_table(pa.table({"path": ["2020/0.png", "2.png"], "label": ["x", "y"]}), raw.parent / "labels.parquet")
    offers = opened({"folder": str(raw)}, {"parquet": str(raw.parent / "labels.parquet")})
    assert len(offers) == 3
    assert offers.classes == ["x", "y"]


def test_images_of_a_later_table_that_no_source_has_are_added(raw: Path, labels: Path) -> None:
    (labels.parent / "more.png").write_bytes(png())
    labels.write_text("path,label\n2020/0.png,ant\nmore.png,bee\ngone.png,bee\n")
    offers = opened({"folder": str(raw)}, {"csv": str(labels)})
    assert len(offers) == 4
    assert offers.labels[-1] == "bee"
    assert [s.path for s in offers.skipped] == ["labels/gone.png (labels.csv, row 4)"]
    files = [read() for read in offers.reads([0, 3])]
    assert files == [(raw / "2020/0.png").read_bytes(), (labels.parent / "more.png").read_bytes()]


def test_several_sources_are_one(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", {"ant": 2}), folder(tmp_path / "two", {"bee": 1, "ant": 1}, "test")
    offers = opened(one, other)
    assert offers.paths == ["one/train/ant/0.png", "one/train/ant/1.png", "two/test/ant/0.png", "two/test/bee/0.png"]
    assert offers.splits == ["train", "train", "test", "test"]
    assert offers.classes == ["ant", "bee"]
    assert [read() for read in offers.reads([1, 3])] == [
        (one / "train/ant/1.png").read_bytes(), (other / "test/bee/0.png").read_bytes(),
    ]  # fmt: skip


def test_two_sources_of_one_name_keep_their_images_apart(tmp_path: Path) -> None:
    offers = opened(folder(tmp_path / "a/raw", {"ant": 1}), folder(tmp_path / "b/raw", {"ant": 1}))
    assert offers.paths == ["raw-1/train/ant/0.png", "raw-2/train/ant/0.png"]


def test_layout_is_found_by_name_and_content(tmp_path: Path) -> None:
    for name in ("t.csv", "t.TSV", "t.jsonl", "t.parquet", "t.tar", "t.tar.gz", "t.zip", "t.npz", "t.arrow"):
        (tmp_path / name).write_text("")
    kinds = {name: specified(str(tmp_path / name)).kind for name in os.listdir(tmp_path)}
    assert kinds == {
        "t.csv": "csv", "t.TSV": "tsv", "t.jsonl": "jsonl", "t.parquet": "parquet", "t.tar": "tar", "t.tar.gz": "tar",
        "t.zip": "zip", "t.npz": "npz", "t.arrow": "arrow",
    }  # fmt: skip
    assert specified("hf:beans").hf == "beans"
    assert specified("torchvision:CIFAR10").torchvision == "CIFAR10"
    assert specified("digits").builtin == "digits"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "does not exist .*give a folder of images"),
        ("odd.xyz", "is a file of no known layout"),
        ("*.tar", "matches nothing: check the path"),
    ],
)
def test_source_that_leads_nowhere_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.xyz").write_text("")
    with pytest.raises(LgpError, match=message):
        opened(source)


def test_folder_named_as_the_built_in_set_is_not_replaced_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "digits", {"7": 1})
    with pytest.raises(LgpError, match=r"write \./digits for the folder, or \{builtin: digits\}"):
        opened("digits")
    assert opened("./digits").classes == ["7"]


def test_source_of_two_layouts_or_none_is_refused(params: Params) -> None:
    for source in ({"folder": "a", "csv": "b"}, {"columns": {"image": "x"}}):
        with pytest.raises(ValueError, match="a source has one of folder, csv"):
            DataParams.model_validate(params.data.model_dump() | {"source": [source]})


def test_states_change_with_what_they_are_of(raw: Path, labels: Path) -> None:
    def states() -> tuple[str, str]:
        offers = opened({"folder": str(raw)}, {"csv": str(labels)})
        return images_state(offers), labels_state(offers)

    before = states()
    labels.write_text("path,label\n2020/0.png,ant\n2.png,bee\n1.png,wasp\n")
    more_labels = states()
    assert more_labels[0] == before[0]
    assert more_labels[1] != before[1]
    (raw / "2021" / "9.png").write_bytes(png())
    more_images = states()
    assert more_images[0] != before[0]
    os.utime(raw / "2021" / "9.png", ns=(1, 1))
    assert states()[0] not in (more_images[0], before[0])


def test_first_label_of_all_changes_the_state_of_the_images(raw: Path, labels: Path) -> None:
    with_labels = images_state(opened({"folder": str(raw)}, {"csv": str(labels)}))
    labels.write_text("path,label\n2020/0.png,\n")
    assert images_state(opened({"folder": str(raw)}, {"csv": str(labels)})) != with_labels


def test_second_label_of_a_class_changes_the_state_of_the_images(raw: Path, labels: Path) -> None:
    def state(text: str) -> str:
        labels.write_text(f"path,label\n{text}")
        return images_state(opened({"folder": str(raw)}, {"csv": str(labels)}))

    one = state("0.png,ant\n")
    assert state("0.png,ant\n1.png,bee\n") == one
    assert state("0.png,ant\n1.png,ant\n") != one
    assert state("0.png,ant\n1.png,ant\n2.png,ant\n") == state("0.png,ant\n1.png,ant\n")


def test_root_that_is_no_folder_is_named(raw: Path, labels: Path) -> None:
    with pytest.raises(LgpError, match=r"data\.source root: nowhere is no folder"):
        opened({"csv": str(labels), "root": "nowhere"})
