"""Splits and few-label subsets."""

import numpy as np
import pytest

from lgp.data.splits import cap, hold_out
from lgp.data.subsets import few_label_subsets
from lgp.errors import LgpError

LABELS = np.repeat(np.arange(5), [100, 50, 200, 7, 60])
CLASSES = list("abcde")


def test_held_out_part_is_stratified_and_seeded() -> None:
    held = hold_out(LABELS, 0.2, 0, "test")
    shares = [held[c == LABELS].mean() for c in range(5)]
    assert shares == pytest.approx([0.2, 0.2, 0.2, 1 / 7, 0.2])
    assert np.array_equal(held, hold_out(LABELS, 0.2, 0, "test"))
    assert not np.array_equal(held, hold_out(LABELS, 0.2, 1, "test"))
    assert not np.array_equal(held, hold_out(LABELS, 0.2, 0, "val"))


def test_holding_out_leaves_and_takes_at_least_one() -> None:
    labels = np.array([0, 0, 1, 1])
    for share in (0.01, 0.99):
        held = hold_out(labels, share, 0, "test")
        assert [held[labels == c].sum() for c in (0, 1)] == [1, 1]
    with pytest.raises(LgpError, match="class number 1 has 1 image"):
        hold_out(np.array([0, 0, 1]), 0.5, 0, "test")


def test_subsets_are_balanced_nested_and_distinct() -> None:
    subsets = few_label_subsets(LABELS, {"10pct": 0.1, "1pct": 0.01}, [2], 5, 0, CLASSES)
    for small, two, large in zip(subsets["1pct"], subsets["2shot"], subsets["10pct"], strict=True):
        assert set(small) <= set(two) <= set(large)
        assert np.bincount(LABELS[two]).tolist() == [2] * 5
        assert np.bincount(LABELS[small]).tolist() == [1] * 5
        assert np.bincount(LABELS[large]).tolist() == [8, 8, 8, 7, 8]  # a class gives what it has
        assert large == sorted(set(large))
    assert len({tuple(s) for s in subsets["10pct"]}) == 5


def test_cap_keeps_the_proportions() -> None:
    kept = cap(LABELS, 100, 0, "train")
    assert np.bincount(LABELS[kept]).tolist() == [24, 12, 48, 2, 14]


def test_shot_of_more_images_than_a_class_has_names_the_classes() -> None:
    with pytest.raises(LgpError, match=r"asks for 55 images of each class, fewer are in .* of b \(50\), d \(7\)"):
        few_label_subsets(LABELS, {}, [5, 55], 5, 0, CLASSES)


@pytest.mark.parametrize("most", [5, 6, 11, 50, 100, 333, 417])
def test_cap_keeps_exactly_its_number_and_every_class(most: int) -> None:
    kept = cap(LABELS, most, 0, "train")
    counts = np.bincount(LABELS[kept])
    assert kept.sum() == most
    assert counts.min() >= 1
    assert np.abs(counts - most * np.bincount(LABELS) / len(LABELS)).max() < 2


def test_cap_counts_unlabelled_images_as_one_more_class_and_chooses_the_same_labelled_ones() -> None:
    mixed = np.concatenate([LABELS, np.full(3 * len(LABELS), -1)])
    kept = cap(mixed, 400, 0, "train")
    assert kept.sum() == 400
    assert kept[len(LABELS) :].sum() == 300
    assert np.array_equal(kept[: len(LABELS)], cap(LABELS, 100, 0, "train"))
    assert cap(mixed, 5, 0, "train")[: len(LABELS)].sum() == 5  # a class keeps one, the unlabelled images may keep none


def test_cap_below_the_number_of_classes_is_refused() -> None:
    with pytest.raises(LgpError, match=r"data\.max_test_images 4 is below the number of classes, 5: .* raise it"):
        cap(LABELS, 4, 0, "test")
