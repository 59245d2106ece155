"""Tables that name images: they open images, or label those of other sources."""

import json
from pathlib import Path

import pytest
from made_sources import png

from lgp.data.sources.folder import folder_source
from lgp.data.sources.manifest import label_offers, listed, read_table, table_source
from lgp.data.sources.offers import Columns, Offers
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
    return table_source(read_table(file, columns), file.parent)


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
