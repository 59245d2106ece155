"""From `data.source` to one list of images: layouts, several sources, states."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_sources import folder, png

from lgp.data.sources.offers import Offers
from lgp.data.sources.opening import open_sources, said, specified
from lgp.data.sources.specs import Spec
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
    labels.write_text("path,label\ntest/ant/0.png,wasp\n")
    offers = opened({"folder": str(raw.parent / "split")}, {"csv": str(labels)})
    assert offers.splits == ["test", "train"]
    assert (offers.labels, offers.classes) == (["wasp", None], ["wasp"])


@pytest.mark.parametrize("text", ["path,label\nmore.png,ant\n", "path,label\nb/1.png,\n", "path,patient\n1.png,p\n"])
def test_folders_stay_classes_behind_which_a_table_labels_nothing_of_them(tmp_path: Path, text: str) -> None:
    for name in ("photos/a/0.png", "photos/b/1.png", "more.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    (tmp_path / "extra.csv").write_text(text)
    offers = opened(tmp_path / "photos", tmp_path / "extra.csv")
    assert offers.labels[:2] == ["a", "b"]
    assert offers.labels[2:] == (["ant"] if "more" in text else [])
    assert (
        opened({"folder": str(tmp_path / "photos"), "class_folders": False}, tmp_path / "extra.csv").labels[0] is None
    )


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
    assert specified("hf:beans") == Spec("hf", "beans")
    assert specified("torchvision:CIFAR10") == Spec("torchvision", "CIFAR10")
    assert specified("digits") == Spec("builtin", "digits")


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


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A folder `images` of the images 0.png to 5.png."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        (tmp_path / "images" / f"{i}.png").write_bytes(png())
    return tmp_path


def rows_file(file: Path, *paths: str, label: str = "ant") -> Path:
    file.write_text("path,label\n" + "".join(f"{path},{label}\n" for path in paths))
    return file


def test_name_of_a_table_is_the_split_of_images_of_others_too(flat: Path) -> None:
    train = rows_file(flat / "train.csv", "0.png", "1.png")
    (flat / "validation.csv").write_text("path,label,split\n2.png,ant,\n3.png,ant,train\n")
    test = rows_file(flat / "test.csv", "4.png")
    by_tables = opened(flat / "images", train, flat / "validation.csv", test)
    assert by_tables.splits == ["train", "train", "val", "train", "test", "train"]
    labels = (str(train), str(flat / "validation.csv"), str(test))
    assert opened(flat / "images", tables=labels).splits == by_tables.splits


def test_name_of_a_table_moves_no_image_to_train(flat: Path) -> None:
    (flat / "images").rename(flat / "test")
    (flat / "more").mkdir()
    (flat / "more" / "9.png").write_bytes(png())
    offers = opened(flat / "test", flat / "more", rows_file(flat / "train.csv", "test/0.png", "more/9.png"))
    assert offers.splits == ["test"] * 6 + ["train"]


def test_labels_of_a_table_called_unlabeled_are_none(flat: Path) -> None:
    offers = opened(flat / "images", rows_file(flat / "unlabeled.csv", "0.png"))
    assert set(offers.labels) == {None}


def unreadable(offers: Offers) -> list[str]:
    faults = []
    for path, read in zip(offers.paths, offers.reads(range(len(offers))), strict=True):
        try:
            read()
        except (OSError, ValueError):
            faults.append(path)
    return faults


@pytest.mark.parametrize("path", ["typo/{}.png", "../out/{}.png", "images", "images/0.png/{}.png"])
def test_rows_of_a_table_that_lead_nowhere_cannot_be_read_whatever_stands_before_or_behind(
    flat: Path, path: str
) -> None:
    train = rows_file(flat / "train.csv", *(f"images/{i}.png" for i in range(3)))
    test = rows_file(flat / "test.csv", "images/5.png", *dict.fromkeys(path.format(i) for i in range(4)))
    count = len(test.read_text().splitlines()) - 2
    for sources in ([train, test], [test, train], [{"csv": str(test), "root": str(flat)}, train], [test]):
        offers = opened(*sources)
        assert len(unreadable(offers)) == count
        assert offers.skipped == []


def test_few_rows_that_lead_nowhere_of_a_table_that_labels_others_are_told(flat: Path) -> None:
    table = rows_file(flat / "labels.csv", *(f"{i}.png" for i in range(3)), "gone.png")
    offers = opened(flat / "images", table)
    assert unreadable(offers) == []
    assert [s.reason for s in offers.skipped] == ["no such file"]
    assert offers.notes == ["1 of 4 rows of labels.csv are left out (gone.png (labels.csv, row 5): no such file)"]
    rows_file(table, "0.png", *(f"gone{i}.png" for i in range(5)))
    assert len(unreadable(opened(flat / "images", table))) == 5
    told = opened(flat / "images", tables=(str(table),)).notes
    assert told[0].startswith("5 of 6 rows of labels.csv are left out (gone0.png (labels.csv, row 3): names no image")


@pytest.mark.parametrize("link", [False, True])
def test_table_that_opens_files_of_another_source_is_refused(flat: Path, link: bool) -> None:
    table = rows_file(flat / "l.csv", "images/0.png", "images/1.png")
    other = flat / "images"
    if link:
        other = flat / "linked"
        other.symlink_to("images")
    for sources in ([table, other], [other, {"csv": str(table), "root": str(flat)}]):
        with pytest.raises(LgpError, match=r"lead to the same files \(.*0.png, 2 in all\): put a table behind"):
            opened(*sources)
    assert len(opened(other, table)) == 6


def test_parquet_in_a_folder_labels_its_images(flat: Path) -> None:
    table = pa.table({"file_name": [f"{i}.png" for i in range(5)], "label": list("ababa")})
    for name in ("metadata.parquet", "labels.parquet"):
        pq.write_table(table, flat / "images" / name)
        offers = opened(flat / "images")
        assert (offers.labels, offers.classes) == ([*"ababa", None], ["a", "b"])
        assert [s.path for s in offers.clutter] == [name]
        (flat / "images" / name).unlink()


def test_deep_folder_is_walked(tmp_path: Path) -> None:
    depth, start = 600, Path.cwd()
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("a")
            os.chdir("a")
        Path("x.png").write_bytes(png())
        assert [path.count("/") for path in opened(tmp_path).paths] == [depth]
        os.unlink("x.png")
    finally:
        while Path.cwd() != tmp_path:  # shutil.rmtree cannot
            os.chdir("..")
            os.rmdir("a")
        os.chdir(start)


def test_sources_are_named_without_passwords() -> None:
    assert said(["https://team:S3cretPw@host/a.tar", "photos"]) == "https://host/a.tar, photos"
