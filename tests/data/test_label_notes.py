"""What is told of labels that look like a mistake, and of columns that nobody reads."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_sources import data_params, images_from, labels_from, png
from PIL import Image

from lgp.data.advice import advise
from lgp.data.inspection import inspect
from lgp.data.label_files import added_labels
from lgp.data.label_notes import NO_LABEL, notes_on_equal_pixels, notes_on_names
from lgp.data.preparation import describe
from lgp.data.sources.offers import Columns
from lgp.data.sources.opening import open_sources
from lgp.errors import LgpError
from lgp.params.file import Params


def table(folder: Path, rows: list[str], header: str = "path,label") -> Path:
    """Write images and a table of them."""
    folder.mkdir(exist_ok=True)
    for row in rows:
        (folder / row.split(",")[0]).write_bytes(png())
    (folder / "labels.csv").write_text("\n".join([header, *rows]))
    return folder / "labels.csv"


@pytest.mark.parametrize("word", ["NA", "unknown", "?", "-", "none", "n/a", "Null", " NaN "])
def test_words_for_no_label_are_told(word: str) -> None:
    (note,) = notes_on_names(["cat", word, word, None])
    assert note.startswith(f"warning: {word!r} (2 images) reads like no label, and is a class: leave the label empty")
    assert word.strip().casefold() in NO_LABEL


@pytest.mark.parametrize("names", [["Cat", "cat"], ["cat ", "cat"], ["polar_bear", "Polar  bear"]])
def test_spellings_of_one_class_are_told(names: list[str]) -> None:
    (note,) = notes_on_names([*names, names[0], "dog"])
    assert "differ only in case, blanks or underscores" in note
    assert f"{names[0]!r} (2 images)" in note
    assert f"{names[1]!r} (1 image)" in note
    assert "dog" not in note


def test_other_names_are_not_told() -> None:
    assert notes_on_names(["cat", "dog", "nan bread", "0", "1", "01", None]) == []


def test_equal_pixels_with_two_labels_are_counted() -> None:
    contents, paths = [b"x", b"x", b"y", b"y", b"z", b"z", b"z"], list("abcdefg")
    (note,) = notes_on_equal_pixels(contents, [0, 1, 2, 2, -1, 1, 0], paths)
    assert note.startswith("warning: 4 images have the same pixels as another and another label, as a and b")
    assert notes_on_equal_pixels(contents, [1, 1, 2, 2, -1, 1, 1], paths) == []


def rows_with_mistakes() -> list[str]:
    labels = ["cat"] * 8 + ["dog"] * 8 + ["NA"] * 2 + ["Cat"] * 2
    return [f"{i}.png,{label},{i % 3},p{i}" for i, label in enumerate(labels)]


def test_prepare_labels_and_inspect_say_the_same_of_names_and_pixels(tmp_path: Path, params: Params) -> None:
    file = table(tmp_path / "raw", rows_with_mistakes(), "path,label,fold,case_id")
    (tmp_path / "raw" / "8.png").write_bytes((tmp_path / "raw" / "0.png").read_bytes())  # a cat that is a dog
    metrics, images = images_from(file, tmp_path / "prepared", params)
    of_labels, _ = labels_from(file, images, tmp_path / "labels", params)
    data = data_params(params, file)
    found = inspect(open_sources(data.source), data)
    told = advise(found, params, cuda=False)
    for notes in (metrics["notes"], of_labels["notes"], told):
        assert sum("'NA' (2 images) reads like no label" in note for note in notes) == 1
        assert sum("'Cat' (2 images) and 'cat' (8 images)" in note for note in notes) == 1
    for notes in (metrics["notes"], of_labels["notes"]):
        assert sum("2 images have the same pixels as another and another label, as" in note for note in notes) == 1
    columns = "labels.csv: image from 'path', label from 'label'; no split and no group; not read: fold, case_id"
    for notes in (metrics["notes"], told):
        assert sum(note.startswith(columns) for note in notes) == 1


def test_columns_of_image_tables_that_are_not_read_are_told_once(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "train-1.parquet"):
        rows = {"image": [{"bytes": png(), "path": None}], "label": [0], "image_id": [1], "case_id": ["a"]}
        pq.write_table(pa.table(rows), tmp_path / name)
    (note,) = open_sources([str(tmp_path)]).notes
    assert note.startswith(
        f"2 tables of {tmp_path.name}: image from 'image', label from 'label'; no split and no group"
    )
    assert "not read: image_id, case_id" in note


def test_columns_that_are_read_are_not_told(tmp_path: Path) -> None:
    file = table(tmp_path, ["0.png,cat,train,a", "1.png,dog,,b"], "path,label,split,patient")
    assert open_sources([str(file)]).notes == []


def test_column_that_is_called_like_splits_by_chance_is_not_read(tmp_path: Path) -> None:
    file = table(tmp_path, ["0.png,cat,left wing", "1.png,dog,"], "path,label,part")
    (note,) = open_sources([str(file)]).notes
    assert "no split and no group; not read: part" in note


def test_many_rows_without_an_image_are_counted_and_few_are_named(tmp_path: Path, params: Params) -> None:
    table(tmp_path / "raw", [f"{i}.png,{'ab'[i % 2]}" for i in range(20)])
    rows = [f"gone{i}.png,a" for i in range(30)]
    (tmp_path / "more.csv").write_text("\n".join(["path,label", *rows]))
    metrics, _ = images_from(tmp_path / "raw", tmp_path / "prepared", params, labels=[str(tmp_path / "more.csv")])
    lines = [line for line in describe(metrics) if line.startswith("left out")]
    assert len(lines) == 1
    assert lines[0].startswith("left out 31 files and rows: ")  # with labels.csv itself
    assert lines[0].count("more.csv, row") == 2
    assert "labels.csv (no image, but its labels are read)" in lines[0]
    assert lines[0].endswith("; …: data/prepared/skipped.csv lists all")
    assert len((tmp_path / "prepared" / "skipped.csv").read_text().splitlines()) == 32


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "path,label\n0.png,Hülle\n"),
        ("l.tsv", "path\tlabel\n0.png\tHülle\n"),
        ("l.jsonl", '{"path": "a.png", "label": "x"}\n{"path": "0.png", "label": "Hülle"}\n'),
    ],
)
def test_table_that_is_not_utf_8_is_refused_with_the_place_and_the_remedy(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "0.png").write_bytes(png())
    (tmp_path / name).write_bytes(text.encode("latin1"))
    said = r"is not UTF-8 \(byte 0xfc in line 2\); convert it: iconv -f latin1 -t utf-8 OLD > NEW"
    with pytest.raises(LgpError, match=said):
        open_sources([str(tmp_path / name)])
    offers = open_sources([str(tmp_path / "raw")])
    with pytest.raises(LgpError, match=said):
        added_labels(offers, tmp_path / name, Columns())
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    with pytest.raises(LgpError, match=r"iconv -f utf-16 -t utf-8"):
        added_labels(offers, tmp_path / name, Columns())


def labelled(tmp_path: Path, text: str) -> Any:
    """Return what a table adds to two cats, two dogs and two images without a label."""
    root = tmp_path / "raw"
    root.mkdir()
    for i in range(6):
        Image.fromarray(np.full((4, 4), i, dtype=np.uint8)).save(root / f"{i}.png")
    (tmp_path / "first.csv").write_text("path,label\n0.png,cat\n1.png,cat\n2.png,dog\n3.png,dog\n")
    (tmp_path / "more.csv").write_text(text)
    offers = open_sources([str(root)], None, [str(tmp_path / "first.csv")])
    return added_labels(offers, tmp_path / "more.csv", Columns())


def test_added_labels_list_what_changed_and_which_classes_are_new_and_gone(tmp_path: Path) -> None:
    text = "path,label,rater\n0.png,cats,me\n1.png,,me\n2.png,mouse,me\n3.png,mouse,me\n4.png,NA,me\n"
    said = labelled(tmp_path, text).said()
    assert said[:5] == [
        "1 new labels, 3 changed, none removed, 0 as before, 1 rows without a label",
        "1 rows without a label are of labelled images, which keep theirs: to remove a label, remove it where it was "
        "given (a table, or added_labels.csv)",
        "changed: 0.png cat → cats, 2.png dog → mouse, 3.png dog → mouse",
        "new classes: NA, cats (did you mean cat?), mouse",
        "classes without a label now: dog",
    ]
    assert "cat: 1 labelled images" in said
    assert said[-2].startswith("more.csv: image from 'path', label from 'label'; no split and no group; not read: ra")
    assert said[-1].startswith("warning: 'NA' (1 image) reads like no label")


def test_table_without_a_column_of_labels_is_told_its_columns_and_the_key(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match=r"columns path, diagnosis, none of them of labels.*data.columns: {label: COL"):
        labelled(tmp_path, "path,diagnosis\n0.png,cat\n")
