"""What an evaluation states: its scores by name, and their summary over subsets."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax

from lgp.evaluate.calibration import accuracy_at_coverage, brier_score, fit_temperature
from lgp.evaluate.outcome import Logits, Predicted, Scored, best_on_val, over_subsets, usable_temperature
from lgp.evaluate.statistics import accuracy_interval, calibration_error

RNG = np.random.default_rng(0)
LABELS = {"val": RNG.integers(0, 12, 40), "test": RNG.integers(0, 12, 301)}
IDS = {split: 7 + 2 * np.arange(len(labels)) for split, labels in LABELS.items()}


def logits(seed: int = 0) -> Logits:
    rng = np.random.default_rng(seed)
    of = {split: rng.normal(size=(len(y), 12)) + 2 * np.eye(12)[y] for split, y in LABELS.items()}
    return Logits(of, LABELS, IDS)


def test_every_score_stands_under_its_name_with_four_digits() -> None:
    predicted = logits().at(1.0)
    p, y = predicted.probabilities["test"], LABELS["test"]
    found = predicted.scored()
    top5 = [label in sorted(range(12), key=lambda c: -row[c])[:5] for row, label in zip(p, y, strict=True)]
    expected = {
        "test/top1": 100 * float(np.mean(p.argmax(1) == y)),
        "val/top1": 100 * float(np.mean(predicted.probabilities["val"].argmax(1) == LABELS["val"])),
        "test/top5": 100 * float(np.mean(top5)),
        "test/ece": calibration_error(p, y),
        "test/brier": brier_score(p, y),
        "val/brier": brier_score(predicted.probabilities["val"], LABELS["val"]),
        **{f"test/top1_of_surest_{c}": accuracy_at_coverage(p, y, c / 100) for c in (50, 80, 95)},
    }
    assert found.scores == {name: round(value, 4) for name, value in expected.items()}
    assert found.correct["test/top5"].tolist() == top5
    assert found.table["id"].tolist() == IDS["test"].tolist()
    assert found.table["confidence"].tolist() == pytest.approx(p.max(1).tolist())


def test_equally_likely_classes_are_among_the_five_by_their_number() -> None:
    p = {split: np.full((len(y), 12), 1 / 12) for split, y in LABELS.items()}
    found = Predicted(p, LABELS, IDS).scored()
    assert found.correct["test/top5"].tolist() == (LABELS["test"] >= 7).tolist()


def test_calibrated_scores_keep_the_error_of_before() -> None:
    given = logits()
    found = given.scored(2.0).scores
    after, before = (softmax(given.of["test"] / t, axis=1) for t in (2.0, 1.0))
    assert found["test/ece"] == round(calibration_error(after, LABELS["test"]), 4)
    assert found["test/ece_uncalibrated"] == round(calibration_error(before, LABELS["test"]), 4)
    assert found["temperature"] == 2.0


def test_data_without_test_images_have_no_score_that_says_how_sure_they_are() -> None:
    none = Logits(
        {"val": logits().of["val"], "test": np.empty((0, 12))},
        {"val": LABELS["val"], "test": np.empty(0, dtype=np.int64)},
        {"val": IDS["val"], "test": np.empty(0, dtype=np.int64)},
    )
    with np.errstate(invalid="ignore"), pytest.warns(RuntimeWarning, match="empty"):
        found = none.scored(2.0).scores
    assert found.keys() == {"test/top1", "val/top1", "test/top5", "val/brier", "temperature"}


def test_temperature_of_few_images_or_of_none_that_is_best_is_one() -> None:
    given, y = 3 * logits().of["val"], LABELS["val"]
    found = usable_temperature(given[:20], y[:20])
    assert found == round(fit_temperature(given[:20], y[:20]).value, 6) != 1
    assert usable_temperature(given[:19], y[:19]) == 1
    certain = 9 * np.eye(12)[y]  # all right: the lower the temperature the better
    assert fit_temperature(certain, y).at_bound
    assert usable_temperature(certain, y) == 1
    assert logits().temperature_on_val() == usable_temperature(logits().of["val"], y)


def test_best_on_val_has_the_most_right_then_the_lower_brier_score_then_comes_first() -> None:
    def one(top1: float, brier: float) -> Scored:
        return Scored({"val/top1": top1, "val/brier": brier}, {}, pd.DataFrame())

    assert best_on_val([one(50, 0.1), one(60, 0.9), one(60, 0.8), one(60, 0.8)]) == 2
    assert best_on_val([one(60, 0.1), one(50, 0.0)]) == 0


@pytest.mark.parametrize("subsets", [1, 2, 3])
def test_summary_over_subsets(subsets: int) -> None:
    scored = [logits(seed).scored(1.5) for seed in range(subsets)]
    kept = object()
    found = over_subsets(scored, 30, kept)  # type: ignore[arg-type]
    metrics, top1 = found.metrics, [one.scores["test/top1"] for one in scored]
    low, high = accuracy_interval(np.stack([one.correct["test/top1"] for one in scored]))
    assert metrics["test/top1"] == pytest.approx(np.mean(top1), abs=1e-4)
    assert (metrics["test/top1_low"], metrics["test/top1_high"]) == (round(low, 4), round(high, 4))
    assert metrics["test/ece"] == round(float(np.mean([one.scores["test/ece"] for one in scored])), 4)
    each = {f"test/top1_subset{number}": value for number, value in enumerate(top1)}
    assert {name: value for name, value in metrics.items() if "subset" in name} == {
        "subsets": subsets, **(each if subsets > 1 else {}),
    }  # fmt: skip
    deviations = {name for name in metrics if name.endswith("_std")}
    assert deviations == ({f"{name}_std" for name in scored[0].scores} if subsets > 1 else set())
    if subsets > 1:
        assert metrics["test/top1_std"] == round(float(np.std(top1, ddof=1)), 4)
    assert metrics["labels"] == 30
    assert found.classifier is kept
    assert found.predictions["subset"].tolist() == [n for n in range(subsets) for _ in LABELS["test"]]
    assert found.predictions.index.tolist() == list(range(301 * subsets))
