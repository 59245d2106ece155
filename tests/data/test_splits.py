"""Splits and few-label subsets."""

import numpy as np
import pytest

from lgp.data.splits import cap, check_class_sizes, hold_out
from lgp.data.subsets import few_label_subsets
from lgp.errors import LgpError

LABELS = np.repeat(np.arange(5), [100, 50, 200, 7, 60])
CLASSES = list("abcde")


def test_held_out_part_is_stratified_and_seeded() -> None:
    held = hold_out(LABELS, 0.2, 0, "test")
    assert held.dtype == bool
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


@pytest.mark.parametrize(
    ("counts", "needed", "message"),
    [
        ([3, 0, 4, 0], 1, "no readable training image in class b, d: add some"),
        ([5], 1, "the only class is 'a': evaluation needs two or more"),
        ([3, 2, 4, 1], 3, "fewer than 3 readable training images in class b (2), d (1): one each"),
        ([3, 2, 4, 2], 2, None),
        ([1, 1], 1, None),
    ],
)
def test_classes_that_are_too_small_are_named(counts: list[int], needed: int, message: str | None) -> None:
    labels = np.append(np.repeat(np.arange(len(counts)), counts), [-1, -1])
    if message is None:
        check_class_sizes(labels, CLASSES[: len(counts)], needed)
        return
    with pytest.raises(LgpError) as error:
        check_class_sizes(labels, CLASSES[: len(counts)], needed)
    assert message in str(error.value)


def test_shot_may_be_all_that_a_class_has() -> None:
    for subset in few_label_subsets(LABELS, {}, [7], 2, 0, CLASSES)["7shot"]:
        assert np.bincount(LABELS[subset]).tolist() == [7] * 5
        assert set(np.flatnonzero(LABELS == 3)) <= set(subset)


def test_shot_of_a_class_without_images_names_it() -> None:
    with pytest.raises(LgpError, match=r"fewer are in .* of f \(0\): lower it"):
        few_label_subsets(LABELS, {}, [2], 2, 0, [*CLASSES, "f"])


def test_draws_of_a_seed_stay_what_they_are() -> None:
    """Else subsets and parts of the same parameters change. The numbers were written down on 2026-11-25."""
    labels = np.repeat(np.arange(3), 8)
    assert np.flatnonzero(hold_out(labels, 0.25, 1, "val")).tolist() == [1, 5, 10, 13, 20, 21]
    mixed = np.append(labels, np.full(8, -1))
    assert np.flatnonzero(cap(mixed, 8, 1, "train")).tolist() == [0, 6, 13, 14, 22, 23, 24, 27]
    assert few_label_subsets(labels, {"10pct": 0.25}, [1], 2, 1, list("abc")) == {
        "10pct": [[0, 3, 8, 15, 17, 20], [6, 7, 10, 11, 18, 23]],
        "1shot": [[3, 8, 20], [7, 11, 23]],
    }


def test_cap_passes_over_a_class_without_images_and_keeps_the_only_one_of_another() -> None:
    labels = np.repeat([0, 2, 3], [60, 60, 1])
    for most in (3, 4, 10):
        kept = cap(labels, most, 0, "train")
        assert kept.dtype == bool
        assert kept.sum() == most
        assert kept[labels == 3].all()


def test_cap_of_unlabelled_images_alone_keeps_its_number() -> None:
    assert cap(np.full(20, -1), 7, 0, "train").sum() == 7


@pytest.mark.parametrize(
    ("sizes", "most", "counts"),
    [
        ([60, 60, 1], 4, [2, 1, 1]),  # 1.98, 1.98 and 0.03: what is left goes to the first of equal remainders
        ([50, 30, 1, 1, 1], 6, [2, 1, 1, 1, 1]),  # 3.6 and 2.2 give what the classes of one image take
    ],
)
def test_cap_gives_and_takes_where_a_share_is_rounded_most(sizes: list[int], most: int, counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert np.bincount(labels[cap(labels, most, 0, "train")]).tolist() == counts
