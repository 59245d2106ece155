"""Lists with the name of a published one have its numbers, or are refused with both."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from made_sources import folder, images_from, labels_from

from lgp.data.published_lists import PUBLISHED, PublishedList, check_published
from lgp.errors import LgpError
from lgp.params.file import Params

# 1,000 classes of 140 images, as many as a list of SimCLR takes of a class
LABELS = np.repeat(np.arange(1000), 140)


def of_classes(classes: Mapping[int, int], start: int = 0) -> list[int]:
    """Return ids with that many images of that many classes; of each class those from `start`."""
    counts = [of_class for of_class, number in classes.items() for _ in range(number)]
    return [140 * label + i for label, count in enumerate(counts) for i in range(start, start + count)]


def check(lists: dict[str, Sequence[Sequence[int]]]) -> None:
    check_published(lists, {name: [f"{name}.txt"] * len(files) for name, files in lists.items()}, LABELS)


@pytest.mark.parametrize(
    ("name", "images"),
    [("simclr_1pct", 12_811), ("simclr_10pct", 128_116), ("msn_1shot", 1000), ("msn_2shot", 2000), ("msn_5shot", 5000)],
)
def test_published_numbers_are_accepted(name: str, images: int) -> None:
    ids = of_classes(PUBLISHED[name].classes)
    assert len(ids) == images
    check({name: [ids] * (3 if name.startswith("msn") else 1)})


def test_other_numbers_are_refused_with_given_and_expected() -> None:
    ids = of_classes(PUBLISHED["simclr_1pct"].classes)
    with pytest.raises(
        LgpError,
        match=r"simclr_1pct.txt has 12,810 images of 1,000 classes \(1 × 11 \+ 188 × 12 \+ 811 × 13\); "
        r"simclr_1pct of SimCLR .* has 12,811 images of 1,000 classes \(189 × 12 \+ 811 × 13\): take",
    ):
        check({"simclr_1pct": [ids[1:]]})


def test_as_many_images_of_other_classes_are_refused() -> None:
    with pytest.raises(LgpError, match=r"has 1,000 images of 500 classes .* has 1,000 images of 1,000 classes"):
        check({"msn_1shot": [of_classes({1: 1000}), of_classes({2: 500}), of_classes({1: 1000})]})


def test_list_of_another_number_of_images_a_class_is_refused() -> None:
    right, wrong = of_classes({5: 1000}), of_classes({3: 1000})
    with pytest.raises(LgpError, match=r"has 3,000 images of .*msn_5shot of MSN .* has 5,000 images"):
        check({"msn_5shot": [right, right, wrong]})


def test_number_of_splits_is_the_published_one() -> None:
    with pytest.raises(LgpError, match=r"labels\.lists msn_1shot names 1 file\(s\), but MSN .* has 3 of it: name 3"):
        check({"msn_1shot": [of_classes({1: 1000})]})


def test_one_percent_lies_inside_ten_percent_where_both_are_given() -> None:
    one, ten = (PUBLISHED[name].classes for name in ("simclr_1pct", "simclr_10pct"))
    check({"simclr_1pct": [of_classes(one)], "simclr_10pct": [of_classes(ten)]})
    with pytest.raises(LgpError, match=r"11,000 images of simclr_1pct are not in simclr_10pct"):
        check({"simclr_1pct": [of_classes(one)], "simclr_10pct": [of_classes(ten, start=11)]})


def test_other_names_are_free() -> None:
    check({"official": [of_classes({7: 3})], "simclr": [[0]]})


def test_lists_in_the_parameters_are_checked(tmp_path: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(folder(tmp_path / "source", {"a": 9, "b": 9}), {"a": 4, "b": 4}, "test")
    _, images = images_from(source, tmp_path / "images", params)
    (tmp_path / "list.txt").write_text("train/a/0.png\ntrain/b/0.png\ntrain/b/1.png\n")
    lists = {"lists": {"simclr_1pct": str(tmp_path / "list.txt")}}
    with pytest.raises(LgpError, match=r"list\.txt has 3 images of 2 classes \(1 × 1 \+ 1 × 2\);"):
        labels_from(source, images, tmp_path / "refused", params, **lists)
    monkeypatch.setitem(PUBLISHED, "simclr_1pct", PublishedList("us", 1, {1: 1, 2: 1}))
    _, data = labels_from(source, images, tmp_path / "accepted", params, **lists)
    assert len(data.subsets("simclr_1pct")[0]) == 3
