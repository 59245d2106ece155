"""Intervals, paired comparison and calibration against slow references."""

import itertools

import numpy as np
import pytest
from scipy import optimize, stats
from sklearn.metrics import top_k_accuracy_score

from lgp.evaluate.outcome import Predicted, over_subsets, percent
from lgp.evaluate.statistics import (
    accuracy_interval,
    calibration_bins,
    calibration_error,
    holm,
    paired_gap,
    students_interval,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("right", "images"), [(0, 359), (1, 20), (299, 359), (358, 359), (359, 359)])
def test_interval_of_one_subset_is_scipys_wilson(right: int, images: int) -> None:
    reference = stats.binomtest(right, images).proportion_ci(method="wilson")
    found = accuracy_interval((np.arange(images) < right)[None])
    assert found == pytest.approx((100 * reference.low, 100 * reference.high), abs=1e-9)


def test_equal_subsets_are_worth_no_more_than_one() -> None:
    one = RNG.random((1, 359)) < 0.9
    assert accuracy_interval(np.repeat(one, 5, axis=0)) == pytest.approx(accuracy_interval(one), abs=0.05)


def test_all_right_in_every_subset_has_a_width() -> None:
    for subsets in (1, 5):
        low, high = accuracy_interval(np.ones((subsets, 359), dtype=bool))
        assert (low, high) == (pytest.approx(98.94, abs=0.01), pytest.approx(100))


def test_interval_does_not_leave_0_to_100_percent_by_rounding() -> None:
    ends = [accuracy_interval(np.full((1, images), right)) for right in (False, True) for images in range(1, 99)]
    assert min(low for low, _ in ends) == 0
    assert max(high for _, high in ends) == 100


@pytest.mark.parametrize(
    ("subsets", "images", "few"),
    [(4, 40, False), (2, 12, True)],  # of few images the formula has a lower freedom than the subsets alone
)
def test_interval_of_several_subsets_equals_an_analysis_of_variance_written_out(
    subsets: int, images: int, few: bool
) -> None:
    rng = np.random.default_rng(5)
    correct = (rng.normal(0, 0.1, images) + rng.normal(0, 0.3, (subsets, 1)) + rng.normal(size=(subsets, images))) > 0
    # with one image always right, and one always wrong
    table = np.column_stack([correct.astype(float), np.ones(subsets), np.zeros(subsets)])
    padded = images + 2
    mean, rows, columns = table.mean(), table.mean(1), table.mean(0)
    of_images = subsets * sum((c - mean) ** 2 for c in columns) / (padded - 1)
    of_subsets = padded * sum((r - mean) ** 2 for r in rows) / (subsets - 1)
    rest = sum((table[s, i] - rows[s] - columns[i] + mean) ** 2 for s in range(subsets) for i in range(padded))
    of_rest = rest / (subsets - 1) / (padded - 1)
    variance = (of_images + max(of_subsets - of_rest, 0)) / (subsets * padded)
    parts = of_images**2 / (padded - 1) + of_subsets**2 / (subsets - 1)
    freedom = (variance * subsets * padded) ** 2 / parts
    assert (freedom < subsets - 1) == few
    t = stats.t.ppf(0.975, max(freedom, subsets - 1))
    worth, share = images * mean * (1 - mean) / (padded - 1) / variance, correct.mean()
    ends = [  # Wilson's: where the measured share is t standard errors off
        optimize.brentq(lambda p: (p - share) ** 2 - t**2 * p * (1 - p) / worth, *span)
        for span in ((0, share), (share, 1))
    ]
    assert accuracy_interval(correct) == pytest.approx([100 * end for end in ends])


def pairs_of(only_a: int, only_b: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.arange(images)[None]
    return order < only_a, (order >= only_a) & (order < only_a + only_b)


def test_gap_of_one_subset_is_tangos_published_one() -> None:
    # airway reactivity of 21 children before and after a transplantation (Fagerland et al. 2014, table 8)
    gap = paired_gap(*pairs_of(1, 7, 21))
    assert (gap.low, gap.high) == (pytest.approx(-51.7, abs=0.05), pytest.approx(-2.6, abs=0.05))
    assert gap.points == pytest.approx(-100 * 6 / 21)


def test_p_value_of_one_subset_is_mcnemars() -> None:
    for only_a, only_b in ((12, 3), (5, 5), (1, 0)):
        expected = stats.chi2.sf((only_a - only_b) ** 2 / (only_a + only_b), 1)
        assert paired_gap(*pairs_of(only_a, only_b, 50)).p == pytest.approx(expected)


@pytest.mark.parametrize(("only_a", "only_b"), [(9, 4), (8, 0)])
def test_ends_of_the_gap_are_where_the_score_test_is_at_its_quantile(only_a: int, only_b: int) -> None:
    images, same = 60, 60 - only_a - only_b

    def score(d: float) -> float:
        """The score test of a difference d, by numeric maximum likelihood."""

        def surprise(share: float) -> float:
            return -(
                only_a * np.log(share + d) + only_b * np.log(share) + same * np.log(max(1 - 2 * share - d, 1e-300))
            )

        bounds = (max(-d, 0) + 1e-12, (1 - d) / 2 - 1e-12)
        share = optimize.minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return (only_a - only_b - images * d) / (images * (2 * share + d - d**2)) ** 0.5

    gap = paired_gap(*pairs_of(only_a, only_b, images))
    assert [score(gap.low / 100), score(gap.high / 100)] == pytest.approx([1.96, -1.96], abs=1e-3)


@pytest.mark.parametrize("subsets", [1, 3])
@pytest.mark.parametrize("images", [5, 20, 60])
def test_arm_that_is_ahead_on_every_image_ends_at_100_points(subsets: int, images: int) -> None:
    right = np.ones((subsets, images), dtype=bool)
    for a, b, sign in ((right, ~right, 1), (~right, right, -1)):
        gap = paired_gap(a, b)
        ends = sorted((sign * gap.low, sign * gap.high))
        assert (gap.points, ends[1], gap.won) == (sign * 100, 100, subsets * (sign > 0))
        assert -10 < ends[0] < 90


@pytest.mark.parametrize("subsets", [1, 5])
def test_arms_that_agree_everywhere_are_undecided_with_a_width(subsets: int) -> None:
    right = RNG.random((subsets, 359)) < 0.9
    gap = paired_gap(right, right)
    assert (gap.points, gap.p, gap.won) == (0, 1, 0)
    assert gap.high == pytest.approx(-gap.low)
    assert gap.high == pytest.approx(1.06, abs=0.02)


def test_gap_counts_the_subsets_won() -> None:
    a, b = RNG.random((5, 60)) < 0.8, RNG.random((5, 60)) < 0.7
    gap = paired_gap(a, b)
    assert gap.points == pytest.approx(100 * (a.mean() - b.mean()))
    assert (gap.won, gap.subsets) == ((a.mean(axis=1) > b.mean(axis=1)).sum(), 5)


def test_gap_is_antisymmetric() -> None:
    for subsets in (1, 3):
        a, b = RNG.random((subsets, 40)) < 0.8, RNG.random((subsets, 40)) < 0.6
        there, back = paired_gap(a, b), paired_gap(b, a)
        assert (there.points, there.low, there.high) == pytest.approx((-back.points, -back.high, -back.low))
        assert there.p == pytest.approx(back.p)


def test_p_value_is_below_5_percent_exactly_where_the_interval_excludes_a_tie() -> None:
    decided = set()
    for subsets, shift, _ in itertools.product((1, 2, 5), (0.0, 0.3, 0.6), range(10)):
        easy = RNG.normal(size=60)
        gap = paired_gap(*(easy + move + RNG.normal(size=(subsets, 60)) > 0 for move in (shift, 0)))
        assert (gap.p < 0.05) == (gap.low > 0 or gap.high < 0)
        decided.add(gap.p < 0.05)
    assert decided == {True, False}


def test_holm_adjusts_as_published() -> None:
    # the smallest of four times four, the next times three, …; never below an earlier one (Holm 1979)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


def test_holm_keeps_false_claims_of_a_whole_table_below_5_percent() -> None:
    p = np.random.default_rng(0).random((4000, 20))  # twenty ties, compared
    assert np.mean([min(holm(row)) < 0.05 for row in p]) == pytest.approx(0.05, abs=0.01)
    assert np.mean(p.min(axis=1) < 0.05) > 0.6  # without a correction


Draws = np.random.Generator


def drawn_correct(rng: Draws, share: float, easy: np.ndarray, own: float, subset: float, subsets: int) -> np.ndarray:
    """Draw which predictions of one arm are right: a probit model, whose expected accuracy is exactly `share`.

    Args:
        rng: of the draw.
        share: accuracy over all images and subsets.
        easy: (images,) how easy each image is for every arm.
        own: deviation of how easy an image is for this arm alone.
        subset: deviation of how lucky a subset is for this arm.
        subsets: their number.
    """
    spread = (1 + EASE**2 + own**2 + subset**2) ** 0.5
    lucky, noise = rng.normal(0, subset, (subsets, 1)), rng.normal(size=(subsets, len(easy)))
    return stats.norm.ppf(share) * spread + easy + rng.normal(0, own, len(easy)) + lucky + noise > 0


EASE, TRIALS = 2.0, 1500  # deviation of how easy an image is; number of simulated test sets


@pytest.mark.parametrize(
    ("subsets", "share", "subset"),
    [(1, 0.6, 0.0), (1, 0.9, 0.0), (1, 0.97, 0.0), (5, 0.6, 0.1), (5, 0.85, 0.3), (5, 0.7, 0.6), (5, 0.95, 0.3)],
)
def test_interval_of_an_accuracy_covers_the_truth_in_95_percent(subsets: int, share: float, subset: float) -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(TRIALS):
        low, high = accuracy_interval(drawn_correct(rng, share, rng.normal(0, EASE, 359), 0, subset, subsets))
        inside += low <= 100 * share <= high
    assert 0.93 < inside / TRIALS < 0.97


@pytest.mark.parametrize(("subsets", "least"), [(2, 0.86), (3, 0.90)])
def test_interval_of_fewer_than_five_subsets_covers_less_where_they_differ_much(subsets: int, least: float) -> None:
    """As docs/evaluation.md says: two or three values hardly tell how much subsets differ."""
    rng = np.random.default_rng(1)
    inside = np.zeros(2)
    for _ in range(TRIALS):
        for i, subset in enumerate((0.1, 0.5)):
            low, high = accuracy_interval(drawn_correct(rng, 0.6, rng.normal(0, EASE, 359), 0, subset, subsets))
            inside[i] += low <= 60 <= high
    assert inside[0] / TRIALS > 0.93
    assert least < inside[1] / TRIALS < 0.93


@pytest.mark.parametrize(
    ("subsets", "a", "b", "subset"),
    [
        (1, 0.7, 0.7, 0.0),
        (1, 0.9, 0.85, 0.0),
        (1, 0.97, 0.95, 0.0),
        (5, 0.6, 0.6, 0.2),
        (5, 0.9, 0.85, 0.3),
        (5, 0.97, 0.95, 0.3),
    ],
)
def test_interval_of_a_gap_covers_the_truth_in_95_percent(subsets: int, a: float, b: float, subset: float) -> None:
    rng = np.random.default_rng(2)
    inside = decided = 0
    for _ in range(TRIALS):
        easy = rng.normal(0, EASE, 359)
        gap = paired_gap(*(drawn_correct(rng, share, easy, 1.0, subset, subsets) for share in (a, b)))
        inside += gap.low <= 100 * (a - b) <= gap.high
        decided += gap.p < 0.05
    assert 0.93 < inside / TRIALS < 0.97
    assert a != b or decided == TRIALS - inside


@pytest.mark.parametrize("subsets", [1, 5])
def test_intervals_of_few_images_near_100_percent_err_on_the_safe_side(subsets: int) -> None:
    """Student's t without the two added images covers the truth in half of these cases."""
    rng = np.random.default_rng(3)
    inside = np.zeros(2)
    for _ in range(TRIALS):
        easy = rng.normal(0, EASE, 60)
        a, b = (drawn_correct(rng, 0.985, easy, 1.0, 0.1, subsets) for _ in range(2))
        low, high = accuracy_interval(a)
        gap = paired_gap(a, b)
        inside += low <= 98.5 <= high, gap.low <= 0 <= gap.high
    assert (inside / TRIALS > 0.93).all()


def test_calibration_error_equals_the_definition() -> None:
    probabilities = RNG.dirichlet(np.full(4, 0.4), 500)
    labels = RNG.integers(0, 4, 500)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert calibration_error(probabilities, labels) == pytest.approx(100 * expected)
    certain = np.eye(4)[labels]
    assert calibration_error(certain, labels) == 0


def test_bins_are_open_below_and_the_ends_belong_to_the_first_and_the_last() -> None:
    confidence = [0.0, 1e-9, 1 / 15, 1 / 15 + 1e-9, 14 / 15, 14 / 15 + 1e-9, 1.0, 1 + 1e-7]  # a rounded sum of shares
    assert calibration_bins(np.array(confidence)).tolist() == [0, 0, 0, 1, 13, 14, 14, 14]


def test_interval_of_seeds_is_students() -> None:
    values = [70.0, 74.0, 71.0, 76.0]
    low, high = students_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def predicted(classes: int, images: int = 200) -> Predicted:
    probabilities = {s: RNG.dirichlet(np.ones(classes), images) for s in ("val", "test")}
    labels = {s: RNG.integers(0, classes, images) for s in ("val", "test")}
    return Predicted(probabilities, labels, {s: np.arange(images) for s in ("val", "test")})


def test_top_1_and_top_5_are_scikit_learns() -> None:
    some = predicted(12)
    scores, probabilities, labels = some.scored().scores, some.probabilities["test"], some.labels["test"]
    for k in (1, 5):
        expected = 100 * top_k_accuracy_score(labels, probabilities, k=k, labels=range(12))
        assert scores[f"test/top{k}"] == pytest.approx(expected, abs=1e-3)
    slow = [label in np.argsort(-p)[:5] for label, p in zip(labels, probabilities, strict=True)]
    assert scores["test/top5"] == pytest.approx(100 * np.mean(slow), abs=1e-3)
    assert "test/top5" in predicted(10).scored().scores
    assert "test/top5" not in predicted(9).scored().scores


def test_brier_score_on_val_is_of_val() -> None:
    some = predicted(4)
    of_val, labels = some.probabilities["val"], some.labels["val"]
    expected = np.mean([np.sum((p - np.eye(4)[label]) ** 2) for p, label in zip(of_val, labels, strict=True)])
    assert some.scored().scores["val/brier"] == pytest.approx(expected, abs=1e-4)


def test_equal_probabilities_are_ranked_the_same_everywhere() -> None:
    """Of twelve equal probabilities the last five classes count as the top five."""
    probabilities, labels = np.full((12, 12), 1 / 12), np.arange(12)
    ids = {"val": labels, "test": labels}
    some = Predicted({"val": probabilities, "test": probabilities}, ids, ids)
    assert some.scored().correct["test/top5"].tolist() == [label >= 7 for label in labels]


def test_metrics_have_four_decimals_and_two_subsets_a_deviation() -> None:
    metrics = over_subsets([predicted(12).scored() for _ in range(2)], labels=30).metrics
    assert {"test/top1_std", "test/ece_std"} <= metrics.keys()
    assert all(value == round(value, 4) for value in metrics.values())


def test_subsets_are_summed_up_and_predictions_give_the_metric_back() -> None:
    several = [predicted(3) for _ in range(5)]
    outcome = over_subsets([p.scored() for p in several], labels=30)
    each = [p.scored().scores["test/top1"] for p in several]
    assert outcome.metrics["test/top1"] == pytest.approx(np.mean(each), abs=1e-3)
    assert outcome.metrics["test/top1_std"] == pytest.approx(np.std(each, ddof=1), abs=1e-3)
    assert [outcome.metrics[f"test/top1_subset{i}"] for i in range(5)] == each
    assert next(iter(outcome.metrics)) == "test/top1"
    table = outcome.predictions
    accuracy = (table["label"] == table["prediction"]).groupby(table["subset"]).mean() * 100
    assert accuracy.tolist() == pytest.approx(each, abs=1e-3)
    assert not any("std" in name for name in over_subsets([several[0].scored()], 30).metrics)


def test_every_accuracy_has_the_interval_of_its_images_and_subsets() -> None:
    several = [predicted(12) for _ in range(3)]
    metrics = over_subsets([p.scored() for p in several], labels=30).metrics
    for split, k in (("test", 1), ("val", 1), ("test", 5)):
        order = [np.argsort(-p.probabilities[split], axis=1)[:, :k] for p in several]
        correct = [(o == p.labels[split][:, None]).any(axis=1) for o, p in zip(order, several, strict=True)]
        found = metrics[f"{split}/top{k}_low"], metrics[f"{split}/top{k}_high"]
        assert found == pytest.approx(accuracy_interval(np.stack(correct)), abs=1e-4)
    assert not any(name.startswith("test/ece_") and not name.endswith("_std") for name in metrics)


def test_predictions_have_a_row_for_each_test_image_and_subset() -> None:
    several = [predicted(3, images=4) for _ in range(2)]
    table = over_subsets([p.scored() for p in several], labels=30).predictions
    assert table.index.tolist() == list(range(8))
    assert table["subset"].tolist() == [0] * 4 + [1] * 4
    assert table["id"].tolist() == [0, 1, 2, 3] * 2
    assert table["label"].tolist() == [label for p in several for label in p.labels["test"]]
    probabilities = np.concatenate([p.probabilities["test"] for p in several])
    assert np.array_equal(table["prediction"], probabilities.argmax(1))
    assert np.array_equal(table["confidence"], probabilities.max(1).astype(np.float32))
    assert table.dtypes[["prediction", "confidence"]].tolist() == [np.int64, np.float32]


def test_numbers_have_four_digits_and_those_of_the_task_stand_beside_them() -> None:
    assert percent(np.array([True, False, False])) == 33.3333
    several = [predicted(3, images=7) for _ in range(3)]
    metrics = over_subsets([p.scored() for p in several], labels=30).metrics
    assert all(value == round(value, 4) for value in metrics.values())
    assert any(value != round(value, 3) for value in metrics.values())
    assert (metrics["labels"], metrics["subsets"]) == (30, 3)
    errors = [calibration_error(p.probabilities["test"], p.labels["test"]) for p in several]
    assert metrics["test/ece"] == pytest.approx(np.mean(errors), abs=1e-4)
    assert metrics["test/ece_std"] == pytest.approx(np.std(errors, ddof=1), abs=1e-4)
