"""Splits and few-label subsets."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lgp.data.held_out import Draw, HeldOut, draw_held_out, read_held_out
from lgp.data.splits import _chosen, _most_frequent, cap, hold_out, notes_on_classes, order_keys
from lgp.data.subsets import _to_the_end, few_label_subsets
from lgp.errors import LgpError
from lgp.params.labels import LabelsParams

LABELS = np.repeat(np.arange(5), [100, 50, 200, 7, 60])
CLASSES = list("abcde")


def names(labels: np.ndarray) -> list[str]:
    return [f"image {i}" for i in range(len(labels))]


def held_out(
    labels: np.ndarray, share: float, seed: int, name: str, groups: list[str | None] | None = None
) -> np.ndarray:
    return hold_out(labels, names(labels), groups or [None] * len(labels), share, seed, name)


def capped(labels: np.ndarray, most: int, seed: int, name: str) -> np.ndarray:
    return cap(labels, names(labels), most, seed, name)


def drawn(
    labels: np.ndarray,
    shares: dict[str, float],
    shots: list[int],
    subsets: int,
    classes: list[str] = CLASSES,
    groups: list[str | None] | None = None,
    seed: int = 0,
) -> dict[str, list[list[int]]]:
    params = LabelsParams.model_construct(shares=shares, shots=shots, subsets=subsets, whole_groups=groups is not None)
    return few_label_subsets(labels, names(labels), params, seed, classes, groups or [None] * len(labels))


def test_held_out_part_is_stratified_and_seeded() -> None:
    held = held_out(LABELS, 0.2, 0, "test")
    assert held.dtype == bool
    shares = [held[c == LABELS].mean() for c in range(5)]
    assert shares == pytest.approx([0.2, 0.2, 0.2, 1 / 7, 0.2])
    assert np.array_equal(held, held_out(LABELS, 0.2, 0, "test"))
    assert not np.array_equal(held, held_out(LABELS, 0.2, 1, "test"))
    assert not np.array_equal(held, held_out(LABELS, 0.2, 0, "val"))


def test_holding_out_leaves_and_takes_at_least_one() -> None:
    labels = np.array([0, 0, 1, 1])
    for share in (0.01, 0.99):
        held = held_out(labels, share, 0, "test")
        assert [held[labels == c].sum() for c in (0, 1)] == [1, 1]
    assert not held_out(np.array([0, 0, 1]), 0.5, 0, "test")[2]


def test_subsets_are_balanced_nested_and_distinct() -> None:
    subsets = drawn(LABELS, {"10pct": 0.1, "1pct": 0.01}, [2], 5)
    for small, two, large in zip(subsets["1pct"], subsets["2shot"], subsets["10pct"], strict=True):
        assert set(small) <= set(two) <= set(large)
        assert np.bincount(LABELS[two]).tolist() == [2] * 5
        assert np.bincount(LABELS[small]).tolist() == [1] * 5
        assert np.bincount(LABELS[large]).tolist() == [8, 8, 8, 7, 8]  # a class gives what it has
        assert large == sorted(set(large))
    assert len({tuple(s) for s in subsets["10pct"]}) == 5


def test_cap_keeps_the_proportions() -> None:
    kept = capped(LABELS, 100, 0, "train")
    assert np.bincount(LABELS[kept]).tolist() == [24, 12, 48, 2, 14]


def test_shot_of_more_images_than_a_class_has_names_the_classes() -> None:
    with pytest.raises(LgpError, match=r"asks for 55 images of each class, fewer are in .* of b \(50\), d \(7\)"):
        drawn(LABELS, {}, [5, 55], 5)


@pytest.mark.parametrize("most", [5, 6, 11, 50, 100, 333, 417])
def test_cap_keeps_exactly_its_number_and_every_class(most: int) -> None:
    kept = capped(LABELS, most, 0, "train")
    counts = np.bincount(LABELS[kept])
    assert kept.sum() == most
    assert counts.min() >= 1
    assert np.abs(counts - most * np.bincount(LABELS) / len(LABELS)).max() < 2


def test_cap_counts_unlabelled_images_as_one_more_class_and_chooses_the_same_labelled_ones() -> None:
    mixed = np.concatenate([LABELS, np.full(3 * len(LABELS), -1)])
    kept = capped(mixed, 400, 0, "train")
    assert kept.sum() == 400
    assert kept[len(LABELS) :].sum() == 300
    assert np.array_equal(kept[: len(LABELS)], capped(LABELS, 100, 0, "train"))
    assert (
        capped(mixed, 5, 0, "train")[: len(LABELS)].sum() == 5
    )  # a class keeps one, the unlabelled images may keep none


def test_cap_below_the_number_of_classes_is_refused() -> None:
    with pytest.raises(LgpError, match=r"data\.max_test_images 4 is below the number of classes, 5: .* raise it"):
        capped(LABELS, 4, 0, "test")


@pytest.mark.parametrize(
    ("counts", "held_out", "said"),
    [
        ([9, 0, 5, 0], True, ["no labelled image of b, d: not evaluated"]),
        (
            [9, 1, 4],
            True,
            [
                "fewer than 5 labelled images of b (1), c (4): their accuracy says little; one image of a class stays "
                "for training, so some of these are in no test or validation part"
            ],
        ),
        ([9, 1], False, ["fewer than 5 labelled images of b (1): their accuracy says little"]),
        ([5, 5], True, []),
    ],
)
def test_classes_with_few_labels_are_told(counts: list[int], held_out: bool, said: list[str]) -> None:
    assert notes_on_classes(dict(zip(CLASSES, counts, strict=False)), held_out) == said


def test_images_without_any_label_are_told() -> None:
    assert notes_on_classes({"a": 0}, False)[0].startswith("no image has a label: encoders can be trained")


def test_a_group_is_held_out_as_a_whole() -> None:
    groups = [f"patient {i // 4}" for i in range(len(LABELS))]
    held = held_out(LABELS, 0.2, 0, "test", groups)
    by_group: dict[str, set[bool]] = {}
    for group, of_image in zip(groups, held.tolist(), strict=True):
        by_group.setdefault(group, set()).add(of_image)
    assert all(len(parts) == 1 for parts in by_group.values())
    assert held.mean() == pytest.approx(0.2, abs=0.03)


def test_unlabelled_images_are_held_out_with_their_group_only() -> None:
    labels = np.array([0, -1, 0, -1, -1, 0, 0])
    held = held_out(labels, 0.4, 0, "test", ["p", "p", "q", "q", None, "r", "s"])
    assert not held[4]
    assert held[0] == held[1]
    assert held[2] == held[3]
    assert held.any()


def test_subsets_of_whole_groups_cut_none() -> None:
    labels = np.repeat([0, 1], 40)
    groups = [f"{'ab'[c]}{i % 10}" for c in (0, 1) for i in range(40)]
    for subset in drawn(labels, {}, [6], 3, list("ab"), groups)["6shot"]:
        assert np.bincount(labels[subset]).tolist() == [8, 8]
        assert len({groups[i] for i in subset}) == 4


def test_order_of_images_is_their_own() -> None:
    """Other images beside them, or another order, change nothing."""
    keys = order_keys(["a", "b", "c"], 0, "x")
    assert order_keys(["c", "new", "a"], 0, "x").tolist() == [keys[2], order_keys(["new"], 0, "x")[0], keys[0]]
    assert (keys != order_keys(["a", "b", "c"], 1, "x")).all()
    assert (keys != order_keys(["a", "b", "c"], 0, "y")).all()


DRAW = Draw(0, 0.2, 0.1)


def drawn_parts(labels: np.ndarray, given: np.ndarray | None = None, draw: Draw = DRAW) -> np.ndarray:
    parts = np.full(len(labels), "train", dtype=object) if given is None else given
    nothing: list[Any] = [None] * len(labels)
    return draw_held_out(HeldOut(draw), names(labels), labels, nothing, parts).parts(names(labels), nothing)


def test_test_and_val_are_drawn_of_what_is_left() -> None:
    parts = drawn_parts(LABELS)
    assert [(parts == part).sum() for part in ("test", "val", "train")] == [83, 34, 300]
    for part in ("test", "val"):
        assert set(LABELS[parts == part]) == set(range(5))


def test_given_parts_and_shares_of_zero_draw_nothing() -> None:
    given = np.full(len(LABELS), "train", dtype=object)
    given[:10] = "test"
    assert set(drawn_parts(LABELS, given)[given == "train"]) == {"train", "val"}
    assert set(drawn_parts(LABELS, draw=Draw(0, 0.0, 0.0))) == {"train"}


def test_what_is_held_out_stays_when_images_and_labels_come(tmp_path: Any) -> None:
    file, nothing = tmp_path / "held_out.csv", [None] * len(LABELS)
    given = np.full(len(LABELS), "train", dtype=object)
    draw_held_out(HeldOut(DRAW), names(LABELS), LABELS, nothing, given).write(file)
    kept = read_held_out(file, DRAW)
    assert kept is not None
    more = [*names(LABELS)[::-1], "new 1", "new 2"]
    parts = dict(zip(more, kept.parts(more, [None] * len(more)), strict=True))
    assert [parts[name] for name in names(LABELS)] == drawn_parts(LABELS).tolist()
    assert parts["new 1"] == parts["new 2"] == "train"


def test_part_that_is_not_held_out_yet_is_drawn_and_the_other_stays() -> None:
    before, nothing = HeldOut(DRAW, {"image 0": "val", "image 120": "val"}), [None] * len(LABELS)
    given = np.full(len(LABELS), "train", dtype=object)
    kept = draw_held_out(before, names(LABELS), LABELS, nothing, given)
    assert {name for name, part in kept.images.items() if part == "val"} == {"image 0", "image 120"}
    assert sum(part == "test" for part in kept.images.values()) == 83


def test_image_of_a_held_out_group_goes_with_it(tmp_path: Any) -> None:
    HeldOut(DRAW, {"a": "val"}, {"p": "test"}).write(tmp_path / "held_out.csv")
    kept = read_held_out(tmp_path / "held_out.csv", DRAW)
    assert kept is not None
    assert kept.parts(["a", "b", "c"], [None, "p", "q"]).tolist() == ["val", "test", "train"]


def test_group_and_equal_images_share_a_part_whatever_was_held_out_before() -> None:
    before = HeldOut(DRAW, {"a": "test", "d": "val"}, {})
    parts = before.parts(["a", "b", "c", "c", "d", "e"], ["p", "p", "p", None, "q", None])
    assert parts.tolist() == ["test", "test", "test", "test", "val", "train"]


def test_images_of_a_renamed_group_stay_held_out() -> None:
    labels, given = np.repeat([0, 1], 20), np.full(40, "train", dtype=object)
    groups = [f"p{i // 4}" for i in range(40)]
    kept = draw_held_out(HeldOut(DRAW), names(labels), labels, groups, given)
    renamed = kept.parts(names(labels), [f"new {group}" for group in groups])
    assert renamed.tolist() == kept.parts(names(labels), groups).tolist()
    assert set(renamed) == {"train", "val", "test"}


def test_file_of_another_draw_does_not_count_and_a_damaged_one_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "held_out.csv"
    HeldOut(DRAW, {"a": "val"}).write(file)
    assert read_held_out(file, Draw(1, 0.2, 0.1)) is None
    assert read_held_out(file, Draw(0, 0.3, 0.1)) is None
    assert read_held_out(tmp_path / "none.csv", DRAW) is None
    text = file.read_text()
    for damaged in (text.replace('"val"', '"vale"'), "", "junk\n", text.replace('"image"', '"picture"')):
        file.write_text(damaged)
        with pytest.raises(LgpError, match=r"is damaged: restore it .* drawn anew"):
            read_held_out(file, DRAW)


def test_shot_may_be_all_that_a_class_has() -> None:
    for subset in drawn(LABELS, {}, [7], 2)["7shot"]:
        assert np.bincount(LABELS[subset]).tolist() == [7] * 5
        assert set(np.flatnonzero(LABELS == 3)) <= set(subset)


def test_shot_of_a_class_without_images_names_it() -> None:
    with pytest.raises(LgpError, match=r"fewer are in .* of f \(0\): lower it"):
        drawn(LABELS, {}, [2], 2, [*CLASSES, "f"])


def test_draws_of_a_seed_stay_what_they_are() -> None:
    """Else subsets and parts of the same parameters change. The numbers were written down on 2026-11-25."""
    labels = np.repeat(np.arange(3), 8)
    assert np.flatnonzero(held_out(labels, 0.25, 1, "val")).tolist() == [1, 4, 9, 12, 17, 21]
    mixed = np.append(labels, np.full(8, -1))
    assert np.flatnonzero(capped(mixed, 8, 1, "train")).tolist() == [1, 7, 10, 12, 16, 22, 25, 31]
    assert drawn(labels, {"10pct": 0.25}, [1], 2, list("abc"), seed=1) == {
        "10pct": [[4, 5, 11, 12, 16, 23], [2, 3, 9, 10, 21, 23]],
        "1shot": [[4, 11, 16], [2, 9, 21]],
    }


def test_cap_passes_over_a_class_without_images_and_keeps_the_only_one_of_another() -> None:
    labels = np.repeat([0, 2, 3], [60, 60, 1])
    for most in (3, 4, 10):
        kept = capped(labels, most, 0, "train")
        assert kept.dtype == bool
        assert kept.sum() == most
        assert kept[labels == 3].all()


def test_cap_of_unlabelled_images_alone_keeps_its_number() -> None:
    assert capped(np.full(20, -1), 7, 0, "train").sum() == 7


@pytest.mark.parametrize(
    ("sizes", "most", "counts"),
    [
        ([60, 60, 1], 4, [2, 1, 1]),  # 1.98, 1.98 and 0.03: what is left goes to the first of equal remainders
        ([50, 30, 1, 1, 1], 6, [2, 1, 1, 1, 1]),  # 3.6 and 2.2 give what the classes of one image take
    ],
)
def test_cap_gives_and_takes_where_a_share_is_rounded_most(sizes: list[int], most: int, counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert np.bincount(labels[capped(labels, most, 0, "train")]).tolist() == counts


def test_names_that_are_no_text_have_an_order() -> None:
    assert len(set(order_keys(["\udcff", "\udcfe"], 0, "x").tolist())) == 2


def test_class_of_a_group_is_its_most_frequent() -> None:
    """Of equally frequent ones it is the lowest; a group without a label has none."""
    units = np.array([0, 0, 0, 1, 1, 2, 5, 4, 4, 4])
    labels = np.array([1, 1, 0, 1, 0, 2, 0, 3, 1, 3])
    assert _most_frequent(units, labels, 6).tolist() == [1, 0, 2, -1, 3, 0]


@pytest.mark.parametrize(
    ("sizes", "share", "chosen"),
    [
        ([2, 1], 0.7, [0]),  # as many as the quota
        ([1, 1], 0.9, [0]),  # never the last one
        ([3, 2], 0.1, [1]),  # none fits: the smallest
        ([3, 2, 4], 0.1, [1]),
        ([5], 0.9, []),
    ],
)
def test_units_of_a_class_are_chosen_up_to_its_quota(sizes: list[int], share: float, chosen: list[int]) -> None:
    assert _chosen(np.arange(len(sizes)), np.array(sizes), share) == chosen


@pytest.mark.parametrize(
    ("units", "number", "expected"),
    [("aab", 1, 2), ("aab", 0, 0), ("aab", 2, 2), ("aab", 3, 3), ("ab", 1, 1), ("aaab", 1, 3), ("aba", 2, 2)],
)
def test_number_of_images_goes_to_the_end_of_a_group(units: str, number: int, expected: int) -> None:
    assert _to_the_end(np.array(list(units), dtype=object), number) == expected


def test_groups_change_no_subset_unless_whole_ones_are_asked_for() -> None:
    params = LabelsParams.model_construct(shares={}, shots=[3], subsets=2, whole_groups=False)
    groups = [f"p{i // 5}" for i in range(len(LABELS))]
    grouped = few_label_subsets(LABELS, names(LABELS), params, 0, CLASSES, groups)
    assert grouped == few_label_subsets(LABELS, names(LABELS), params, 0, CLASSES, [None] * len(LABELS))


def test_many_classes_without_labels_are_counted() -> None:
    empty = {f"c{i:02}": 0 for i in range(12)} | {"full": 9, "other": 9}
    assert notes_on_classes(empty, False)[0].endswith("c09 and 2 more classes: not evaluated")
    assert "more" not in notes_on_classes({f"c{i:02}": 0 for i in range(10)} | {"full": 9, "other": 9}, False)[0]


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(NAMES, NAMES, st.booleans())
@example("g\u2028h", "a\x85\x0b\x1c.png", True)
@example("g\rh", 'a\r\n"b",.png', False)
def test_any_name_is_read_back(tmp_path: Any, group: str, path: str, val_is_test: bool) -> None:
    held_out = HeldOut(DRAW, {"00": "test"}, {group: "val"}, {"00": path}, val_is_test)
    held_out.write(tmp_path / "held_out.csv")
    assert read_held_out(tmp_path / "held_out.csv", DRAW) == held_out


def test_file_without_paths_is_read(tmp_path: Any) -> None:
    (tmp_path / "held_out.csv").write_text(f"{DRAW}\r\nimage,group,part\r\n00,,test\r\n,p,val\r\n", newline="")
    assert read_held_out(tmp_path / "held_out.csv", DRAW) == HeldOut(DRAW, {"00": "test"}, {"p": "val"})


def test_labels_of_one_class_are_told() -> None:
    said = "all labels are of one class (ant): there is nothing to tell apart"
    assert notes_on_classes({"ant": 9, "bee": 0}, False)[0] == said
    assert said not in notes_on_classes({"ant": 9, "bee": 9}, False)
