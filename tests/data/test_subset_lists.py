"""Published few-label lists: what fits, and what is refused with names."""

from pathlib import Path

import numpy as np
import pytest

from lgp.data.subset_lists import read_subset_list
from lgp.errors import LgpError

PATHS = ["train/cat/1.jpg", "train/cat/a cat 2.jpg", "train/dog/1.jpg", "train/dog/7.jpg", "test/dog/9.jpg"]
LABELS = np.array([0, 0, 1, 1, 1])
SPLITS = ["train", "train", "train", "train", "test"]
CLASSES = ["cat", "dog"]


def read(tmp_path: Path, text: str) -> list[int]:
    (tmp_path / "list.txt").write_text(text)
    return read_subset_list(tmp_path / "list.txt", PATHS, LABELS, SPLITS, CLASSES).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "train/cat/1.jpg\ntrain/dog/7.jpg\n",
        "dog/7.jpg\n\ncat/1.jpg",
        "7.jpg\ncat/1.jpg\n",
        "cat/1.jpg 0\n7.jpg 1\n",
        "cat/1.jpg,cat\n7.jpg, dog\n",
        "cat/1.jpg\t0\n7.jpg\t1\n",
    ],
)
def test_paths_and_names_with_and_without_labels(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == [0, 3]


def test_name_may_hold_blanks(tmp_path: Path) -> None:
    assert read(tmp_path, "a cat 2.jpg\n7.jpg") == [1, 3]
    assert read(tmp_path, "a cat 2.jpg cat\n7.jpg 1") == [1, 3]


def test_names_of_classes_go_before_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a,b.jpg 10\nc.jpg 2\n")
    paths, labels, classes = ["train/10/a,b.jpg", "train/2/c.jpg"], np.array([0, 1]), ["10", "2"]
    assert read_subset_list(tmp_path / "list.txt", paths, labels, ["train"] * 2, classes).tolist() == [0, 1]
    (tmp_path / "list.txt").write_text("a,b.jpg 2\nc.jpg 2\n")
    with pytest.raises(LgpError, match="the image's is 10"):
        read_subset_list(tmp_path / "list.txt", paths, labels, ["train"] * 2, classes)


def test_names_of_classes_may_hold_blanks_and_files_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png,polar bear\n,\nb.png brown bear\n", encoding="utf-8-sig")
    paths, classes = ["train/polar bear/a.png", "train/brown bear/b.png"], ["polar bear", "brown bear"]
    found = read_subset_list(tmp_path / "list.txt", paths, np.array([0, 1]), ["train"] * 2, classes)
    assert found.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat/1.jpg\ndog/8.jpg\n", "unknown: dog/8.jpg"),
        ("cat/1.jpg\n7.jpg\ntrain/dog/7.jpg 1\n", "repeated: train/dog/7.jpg"),
        ("1.jpg\n7.jpg", "fitting several images: 1.jpg"),
        ("cat/1.jpg 1\n7.jpg 1", r"another label than the image's: cat/1.jpg 1 \(the image's is cat\)"),
        ("cat/1.jpg\n9.jpg", r"not of the training part: test/dog/9.jpg \(test\)"),
        ("cat/1.jpg\n", "classes without an image: dog"),
        ("cat/1.jpg\n 1\n7.jpg", "lines without a name: line 2"),
        ("\n\n", "names no image"),
        ("\n".join(f"x{i}.jpg" for i in range(9)), "unknown: x0.jpg, x1.jpg, x2.jpg, x3.jpg, x4.jpg and 4 more"),
    ],
)
def test_list_that_does_not_fit_says_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LgpError, match=message):
        read(tmp_path, text)


def test_list_that_is_not_utf_8_is_told_the_place_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("cat/1.jpg\ncat/H\u00fcte.jpg\n".encode("latin1"))
    with pytest.raises(LgpError, match=r"not UTF-8 \(byte 0xfc in line 2\); convert it: iconv -f latin1 -t utf-8 OLD"):
        read_subset_list(tmp_path / "list.txt", PATHS, LABELS, SPLITS, CLASSES)


def test_absent_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match=r"cannot read the list of images .*none.txt .*mend labels.lists"):
        read_subset_list(tmp_path / "none.txt", PATHS, LABELS, SPLITS, CLASSES)
