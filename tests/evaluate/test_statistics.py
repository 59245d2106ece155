"""Intervals, paired comparison and calibration against slow references."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import top_k_accuracy_score

from lgp.evaluate.outcome import Predicted, over_subsets
from lgp.evaluate.statistics import Gap, accuracy_ci95, calibration_error, mean_std_ci95, paired_gap

RNG = np.random.default_rng(0)


def test_interval_of_a_mean_is_students() -> None:
    values = [61.0, 70.5, 68.2, 66.6, 71.3]
    mean, std, half = mean_std_ci95(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (mean, std) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_interval_of_an_accuracy_covers_95_percent() -> None:
    measured = 100 * RNG.binomial(400, 0.8, 4000) / 400
    covered = np.mean([abs(m - 80) <= accuracy_ci95(m, 400) for m in measured])
    assert 0.93 < covered < 0.97


def test_gap_of_one_subset_equals_a_bootstrap_written_out() -> None:
    a, b = RNG.random((1, 60)) < 0.8, RNG.random((1, 60)) < 0.6
    slow = []
    for _ in range(4000):
        images = RNG.integers(0, 60, 60)
        slow.append(100 * (a[0, images].mean() - b[0, images].mean()))
    gap = paired_gap(a, b)
    assert gap.points == pytest.approx(100 * (a.mean() - b.mean()))
    assert [gap.low, gap.high] == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.9)
    assert (gap.won, gap.subsets) == (1, 1)


def test_gap_counts_the_subsets_won() -> None:
    a, b = RNG.random((5, 60)) < 0.8, RNG.random((5, 60)) < 0.7
    gap = paired_gap(a, b)
    assert gap.points == pytest.approx(100 * (a.mean() - b.mean()))
    assert (gap.won, gap.subsets) == ((a.mean(axis=1) > b.mean(axis=1)).sum(), 5)


def test_gap_is_antisymmetric_and_nothing_between_equals() -> None:
    a, b = RNG.random((3, 40)) < 0.8, RNG.random((3, 40)) < 0.6
    there, back = paired_gap(a, b), paired_gap(b, a)
    assert (there.points, there.low, there.high) == pytest.approx((-back.points, -back.high, -back.low), abs=0.3)
    same = paired_gap(a, a)
    assert (same.points, same.low, same.high, same.decided) == (0, 0, 0, False)


@pytest.mark.parametrize(("subsets", "subset_effect"), [(1, 0.0), (5, 0.0), (5, 0.03), (5, 0.1)])
def test_interval_of_the_gap_covers_the_truth_in_95_percent(subsets: int, subset_effect: float) -> None:
    """Drawn anew: test images of unequal difficulty, and subsets of labels that are lucky for one arm or the other."""
    rng, inside, trials = np.random.default_rng(3), 0, 600
    for _ in range(trials):
        difficulty = rng.normal(0.6, 0.15, 300)
        lucky = rng.normal(0, subset_effect, subsets)[:, None]
        a = rng.random((subsets, 300)) < difficulty + 0.05 + lucky
        b = rng.random((subsets, 300)) < difficulty
        gap = paired_gap(a, b)
        inside += gap.low <= 5.0 <= gap.high
    # never less; a little more where subsets make no difference, for a variance is at least 0
    assert 0.93 < inside / trials < 0.99


@pytest.mark.parametrize(
    ("gap", "sentence"),
    [
        (Gap(5.0, 2.0, 8.0, 5, 5), "a beats b by 5.0 ± 3.0 points"),
        (Gap(1.0, -2.0, 4.0, 3, 5), "a and b are undecided: a is ahead by 1.0 ± 3.0 points"),
    ],
)
def test_gap_says_who_beats_whom(gap: Gap, sentence: str) -> None:
    assert gap.sentence("a", "b") == sentence


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
    assert "test/top5" not in predicted(5).scored().scores


def test_subsets_are_summed_up_and_predictions_give_the_metric_back() -> None:
    several = [predicted(3) for _ in range(5)]
    outcome = over_subsets([p.scored() for p in several], labels=30)
    each = [p.scored().scores["test/top1"] for p in several]
    assert outcome.metrics["test/top1"] == pytest.approx(np.mean(each), abs=1e-3)
    assert outcome.metrics["test/top1_std"] == pytest.approx(np.std(each, ddof=1), abs=1e-3)
    assert outcome.metrics["test/top1_ci95"] == pytest.approx(mean_std_ci95(each)[2], abs=1e-3)
    assert [outcome.metrics[f"test/top1_subset{i}"] for i in range(5)] == each
    assert next(iter(outcome.metrics)) == "test/top1"
    table = outcome.predictions
    accuracy = (table["label"] == table["prediction"]).groupby(table["subset"]).mean() * 100
    assert accuracy.tolist() == pytest.approx(each, abs=1e-3)
    assert not any("std" in name or "ci95" in name for name in over_subsets([several[0].scored()], 30).metrics)
