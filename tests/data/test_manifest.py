"""Tables that name images: they open images, or label those of other sources."""

import json
import time
import tracemalloc
import unicodedata
from pathlib import Path

import pytest
from made_sources import png

from lgp.data.sources.folder import folder_source
from lgp.data.sources.manifest import ImagesByName, Table, label_offers, listed, read_rows, read_table, table_source
from lgp.data.sources.offers import Columns, Offers, roots_of
from lgp.errors import LgpError


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six images in two folders, of which three share a name."""
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/c/0.png", "b/3.png"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(png())
    return tmp_path / "raw"


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def opened(file: Path, columns: Columns = Columns()) -> Offers:
    rows = read_table(file, columns)
    return table_source(rows, file.parent, forgiven=len(rows.paths))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "path,label,split,group\na/0.png,ant,train,p1\nb/3.png,bee,test,p2\n"),
        ("t.csv", "path;label;split;group\r\na/0.png;ant;train;p1\r\nb/3.png;bee;test;p2\r\n"),
        ("t.csv", "\ufeffPath,Class,Split,Patient\na/0.png,ant,train,p1\nb/3.png,bee,Testing,p2\n"),
        ("t.tsv", "file_name\tlabel\tsplit\tgroup\na/0.png\tant\ttrain\tp1\nb/3.png\tbee\ttest\tp2\n"),
        (
            "t.jsonl",
            '{"path": "a/0.png", "label": "ant", "split": "train", "group": "p1"}\n\n'
            '{"path": "b/3.png", "label": "bee", "split": "test", "group": "p2"}\n',
        ),
        ("t.csv", 'path,label,split,group\n"a/0.png","ant",,p1\n.\\b\\3.png,bee,test,p2\n'),
    ],
)
def test_tables_are_read(raw: Path, name: str, text: str) -> None:
    offers = opened(table(raw, text, name))
    assert [Path(path).name for path in offers.paths] == ["0.png", "3.png"]
    assert (offers.labels, offers.splits, offers.groups) == (["ant", "bee"], ["train", "test"], ["p1", "p2"])
    assert [read() for read in offers.reads([1])] == [(raw / "b" / "3.png").read_bytes()]


def test_columns_are_named_by_parameter(raw: Path) -> None:
    file = table(raw, "id,where,kind\n1,a/0.png,ant\n2,a/1.png,bee\n")
    assert opened(file, Columns(image="where", label="kind")).labels == ["ant", "bee"]
    with pytest.raises(LgpError, match=r"no column 'wher' \(data.columns.image\), only id, where, kind"):
        opened(file, Columns(image="wher"))
    with pytest.raises(LgpError, match="has the columns id, where, kind, none of them of paths"):
        opened(file)


def test_rows_that_cannot_be_opened_are_listed(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    paths = ("a/0.png", "a/9.png", "../secret.png", str(tmp_path / "secret.png"), "a", "", "a/0.png")
    text = "path,label\n" + "".join(f"{path},ant\n" for path in paths)
    offers = opened(table(raw, text))
    assert offers.paths == ["a/0.png"]
    assert [s.reason.split(":")[0] for s in offers.skipped] == [
        "no such file",
        "a path out of the folder of the table",
        "a path out of the folder of the table",
        "not a file",
        "a row without a path",
        "named before, in row 2",
    ]
    assert len(offers) + len(offers.skipped) == len(paths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na/0.png,0.25\na/1.png,1.75\n", "numbers with fractions .* as of a regression"),
        ("path,label\na/0.png,ant|bee\na/1.png,ant\nb/3.png,bee\n", "'ant|bee' names several classes: multi-label"),
        ("path,label\na/0.png,ant\na/0.png,bee\n", "is 'ant' in row 2 and 'bee' in row 3"),
        ("path,label,split\na/0.png,ant,holdout\n", "row 2 has the split 'holdout': valid are train"),
        ("", "has no row below its names of columns"),
        ("path,label\n", "has no row below its names of columns"),
        ('path,label\n"a/0.png,ant\n', "cannot be read as a table"),
        ("path,label\na/0.png,4\na/1.png,4\na/2.png,3.5\n", r"numbers with fractions \(3.5\), as of a regression"),
        ("path,label\na/0.png,-1.5\na/1.png,1e0\n", r"numbers with fractions \(-1.5\), as of a regression"),
        ("path,label\na/0.png,x|y\na/1.png,y|z\nb/3.png,x|z\n", "'x|y' names several classes: multi-label"),
        ("path,label\na/0.png,x; y\na/1.png,y;z\n", "'x; y' names several classes: multi-label"),
        ("path,label\na/0.png,x|y\na/1.png,x\n", "'x|y' names several classes: multi-label"),
        ("path,label\na/0.png,ant\na/1.png,ant,bee\n", "row 3 has 3 cells, but there are 2 columns: .* one label"),
        ("path;label\n\na/0.png;ant;bee\n", "row 3 has 3 cells, but there are 2 columns"),
        ("path,label,label\na/0.png,ant,bee\n", "two columns are called 'label'"),
        ("path,cat,dog\na/0.png,0,1\na/1.png,1,0\n", r"several of only 0 and 1 \(cat, dog\), as of one-hot"),
        ("path,cat,dog,fox\na/0.png,1.0,1.0,0\n", r"several of only 0 and 1 \(cat, dog, fox\)"),
        ("path,cat,dog\na/0.png,True,False\n", r"several of only 0 and 1 \(cat, dog\)"),
    ],
)
def test_faults_of_tables_are_named(raw: Path, text: str, message: str) -> None:
    with pytest.raises(LgpError, match=message):
        opened(table(raw, text))


def test_several_labels_of_an_image_are_refused_in_json(raw: Path) -> None:
    file = table(raw, json.dumps({"path": "a/0.png", "label": ["ant", "bee"]}), "t.jsonl")
    with pytest.raises(
        LgpError, match=r"row 1 has the label \['ant', 'bee'\]: several labels an image are not supported"
    ):
        opened(file)


def test_whole_numbers_are_names_and_negative_ones_no_label(raw: Path) -> None:
    offers = opened(table(raw, "path,label\na/0.png,10.0\na/1.png,9\na/2.png,-1\n"))
    assert offers.labels == ["10", "9", None]
    assert offers.classes == ["9", "10"]


def test_labels_stay_the_text_that_they_are(raw: Path) -> None:
    offers = opened(table(raw, "path,label\na/0.png,007\na/1.png,900000000000207009\na/2.png,-5\n"))
    assert offers.labels == ["007", "900000000000207009", "-5"]


def test_label_of_a_late_row_and_nan_are_read(raw: Path) -> None:
    rows = [json.dumps({"path": f"{i}.png"}) for i in range(120)]
    rows += [json.dumps({"path": "a/0.png", "label": "ant"}), '{"path": "a/1.png", "label": NaN, "group": NaN}']
    offers = opened(table(raw, "\n".join(rows), "t.jsonl"))
    assert (offers.labels, offers.groups) == (["ant", None], [None, None])


def test_column_of_other_words_is_no_split(raw: Path) -> None:
    assert opened(table(raw, "path,label,part\na/0.png,ant,hand\na/1.png,bee,foot\n")).splits == ["train", "train"]
    with pytest.raises(LgpError, match="has the split 'hand'"):
        opened(table(raw, "path,label,part\na/0.png,ant,hand\n"), Columns(split="part"))


def labelled(raw: Path, text: str) -> Offers:
    rows = read_table(table(raw.parent, text))
    return listed(*label_offers(folder_source(raw, class_folders=False), rows), rows)


def test_table_labels_images_of_a_folder_by_the_end_of_their_path(raw: Path) -> None:
    offers = labelled(raw, "path,label,group\n3.png,bee,p1\nraw/a/0.png,ant,\nc/0.png,bee,p1\na/1.png,,p2\n")
    by_path = dict(zip(offers.paths, zip(offers.labels, offers.groups, strict=True), strict=True))
    assert by_path["b/3.png"] == by_path["b/c/0.png"] == ("bee", "p1")
    assert by_path["a/0.png"] == ("ant", None)
    assert by_path["a/1.png"] == (None, "p2")
    assert offers.classes == ["ant", "bee"]


def test_row_that_fits_several_images_or_none_is_refused(raw: Path) -> None:
    with pytest.raises(LgpError, match=r"row 2 names 0.png, which fits 3 images \(a/0.png, b/0.png, b/c/0.png\)"):
        labelled(raw, "path,label\n0.png,ant\n")
    assert [s.reason for s in labelled(raw, "path,label\n9.png,ant\n").skipped] == ["names no image of the source"]


def test_numbers_are_classes_of_a_source_that_declares_an_order(raw: Path) -> None:
    from dataclasses import replace

    declared = replace(folder_source(raw, class_folders=False), classes=["wasp", "ant"], declared=True)
    rows = read_table(table(raw.parent, "path,label\n3.png,1\na/0.png,wasp\n"))
    offers, images = label_offers(declared, rows)
    assert [offers.paths[i or 0] for i in images] == ["b/3.png", "a/0.png"]
    assert {label for label in offers.labels if label} == {"ant", "wasp"}
    assert offers.labels[offers.paths.index("b/3.png")] == "ant"
    with pytest.raises(LgpError, match="has the label 2, but the source has 2 classes, 0 to 1"):
        label_offers(declared, read_table(table(raw.parent, "path,label\n3.png,2\n")))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("path,label\na/0.png,red|apple\na/1.png,cat;dog\n", ["red|apple", "cat;dog"]),
        ("path,label\na/0.png,1.5\na/1.png,other\n", ["1.5", "other"]),
        ("path,label,\na/0.png,ant,\na/1.png,bee,,\n", ["ant", "bee"]),
        ("path,label,small,far\na/0.png,ant,0,1\na/1.png,bee,1,1\n", ["ant", "bee"]),
        ("path,small,years\na/0.png,0,7\na/1.png,1,9\n", [None, None]),
    ],
)
def test_classes_that_only_look_like_several_are_classes(raw: Path, text: str, labels: list[str | None]) -> None:
    assert opened(table(raw, text)).labels == labels


def test_numbers_of_rows_are_those_of_the_file(raw: Path) -> None:
    offers = opened(table(raw, "\npath,label\n\n,\na/0.png,ant\na/9.png,ant\n"))
    assert [skip.path for skip in offers.skipped] == ["a/9.png (t.csv, row 6)"]
    lines = '{"path": "a/0.png", "label": "x\u2028y"}\n\n{"path": "a/9.png"}\n'
    offers = opened(table(raw, lines, "t.jsonl"))
    assert (offers.labels, offers.skipped[0].path) == (["x\u2028y"], "a/9.png (t.jsonl, row 3)")


def test_deep_json_is_an_error_of_the_table(raw: Path) -> None:
    with pytest.raises(LgpError, match="cannot be read as a table"):
        read_rows(table(raw, "[" * 100_000, "t.json"))


NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("on_disk", [NFC, NFD])
@pytest.mark.parametrize("in_table", [NFC, NFD])
def test_paths_in_any_form_of_unicode_open_their_file(raw: Path, on_disk: str, in_table: str) -> None:
    (raw / on_disk).mkdir()
    (raw / on_disk / f"{on_disk}.png").write_bytes(b"its bytes")
    text = f"path,label\n{in_table}/{in_table}.png,ant\n./{in_table}/{in_table}.png,ant\n"
    offers = opened(table(raw, text))
    assert offers.paths == [f"{on_disk}/{on_disk}.png"]
    assert [read() for read in offers.reads([0])] == [b"its bytes"]
    assert [skip.reason for skip in offers.skipped] == ["named before, in row 2"]
    assert labelled(raw, text).labels.count("ant") == 1


def test_a_file_is_one_image_however_its_path_is_spelled(raw: Path) -> None:
    text = "path,label\na/0.png,ant\na//0.png,ant\nb/../a/0.png,ant\na\\0.png,ant\n a/0.png ,ant\n"
    offers = opened(table(raw, text))
    assert offers.paths == ["a/0.png"]
    assert len(offers.skipped) == 4


def test_backslash_in_the_name_of_a_file_is_no_folder(raw: Path) -> None:
    (raw / "a\\1.png").write_bytes(b"another")
    offers = opened(table(raw, "path,label\na\\1.png,bee\na/1.png,ant\na\\2.png,ant\n"))
    assert offers.paths == ["a\\1.png", "a/1.png", "a/2.png"]
    assert next(offers.reads([0]))() == b"another"
    assert labelled(raw, "path,label\na\\1.png,bee\na\\2.png,ant\n").labels.count("bee") == 1


def named(raw: Path, *paths: str) -> list[str | None]:
    """Return the images of a source that the rows of a table beside it name."""
    rows = read_table(table(raw.parent, "path,label\n" + "".join(f"{path},x\n" for path in paths)))
    offers, images = label_offers(folder_source(raw, class_folders=False), rows)
    return [None if image is None else offers.paths[image] for image in images]


def test_row_may_only_have_folders_more_that_are_the_sources_own(tmp_path: Path) -> None:
    raw = tmp_path / "data" / "train"
    for name in ("0.png", "new/1.png", "train/2.png"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(png())
    own = ("train/0.png", "data/train/0.png", str(raw / "0.png"), "data/train/0.png", "./train/0.png")
    assert named(raw, *own, "data/../data/train/0.png") == ["0.png"] * 6
    assert named(raw, "train/new/1.png", "new/1.png", "1.png", "train/train/2.png") == [
        *["new/1.png"] * 3,
        "train/2.png",
    ]
    others = ("test/0.png", "old_project/0.png", "rain/0.png", "x/train/0.png", "test/train/0.png", "0.png/0.png")
    assert named(raw, *others, "old/1.png", "train/1.png", "/0.png", "../0.png") == [None] * 10


def test_row_may_start_at_the_folder_of_its_table(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "0.png").write_bytes(png())
    (tmp_path / "lists").mkdir()
    rows = read_table(table(tmp_path / "lists", "path,label\n../raw/0.png,x\n../0.png,y\n"))
    assert label_offers(folder_source(raw), rows)[1] == [0, None]


def test_row_may_have_the_folders_of_a_link_to_the_source(tmp_path: Path) -> None:
    (tmp_path / "store" / "v2").mkdir(parents=True)
    (tmp_path / "store" / "v2" / "0.png").write_bytes(png())
    (tmp_path / "photos").symlink_to("store/v2")
    assert named(tmp_path / "photos", "photos/0.png", "store/v2/0.png", "v3/0.png") == ["0.png", "0.png", None]


def test_row_that_fits_by_both_ends_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "train"
    for name in ("0.png", "a/train/0.png"):
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(png())
    with pytest.raises(LgpError, match="which fits 2 images"):
        named(raw, "train/0.png")


def same_names(count: int) -> Offers:
    """Images of as many classes, which all have one file name."""
    classes = [f"class{i}" for i in range(count)]
    paths = [f"{i}/image.png" for i in range(count)]
    none: list[str | None] = [None] * count
    return Offers(paths, ["train"] * count, none, none, [""] * count, classes, iter, roots=roots_of("/data/raw"))  # type: ignore[arg-type, call-arg]


def test_time_of_labelling_grows_with_the_rows_alone() -> None:
    offers = same_names(8_000)
    paths = [f"raw/{path}" for path in offers.paths]
    empty: list[str | None] = [None] * len(paths)
    labels: list[str | None] = list(offers.classes)
    start = time.process_time()
    after, images = label_offers(offers, Table(Path("t.csv"), paths, labels, empty, empty, range(len(paths))))
    assert time.process_time() - start < 2  # 0.1 s; each row against each image took 30 s
    assert images == list(range(8_000))
    assert after.labels == offers.classes
    assert ImagesByName(offers).find("7/image.png") == [7]


def test_a_table_is_columns_in_memory(tmp_path: Path) -> None:
    text = "".join(f"folder/image_{i:08}.png,class_{i % 10},train,patient_{i // 10}\n" for i in range(20_000))
    file = table(tmp_path, f"path,label,split,group\n{text}")
    tracemalloc.start()
    try:
        rows = read_table(file)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows.paths) == 20_000
    assert held / 20_000 < 200  # bytes a row, of which its path has 75
