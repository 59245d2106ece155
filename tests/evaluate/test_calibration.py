"""Temperature scaling and calibration against slow references and scikit-learn."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss, log_loss

from lgp.errors import LgpError
from lgp.evaluate.calibration import (
    accuracy_at_coverage,
    at_temperature,
    brier_score,
    calibration_interval,
    confidence_of,
    fit_temperature,
    reliability,
)
from lgp.evaluate.statistics import calibration_error


def interval(probabilities: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the interval of a single classifier."""
    confidence, correct = confidence_of(probabilities, labels)
    return calibration_interval(confidence[None], correct[None], seed)


def simulated(images: int, classes: int = 5, seed: int = 0, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits (N, C), and labels that are drawn from their softmax."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(images, classes))
    labels = (softmax(logits, axis=1).cumsum(1) > rng.random((images, 1))).argmax(1)
    return logits, labels


@pytest.mark.parametrize("factor", [0.2, 1.0, 3.0, 40.0])
def test_temperature_is_the_factor_that_the_logits_are_too_large_by(factor: float) -> None:
    logits, labels = simulated(20_000)
    found = fit_temperature(factor * logits, labels)
    assert found.value == pytest.approx(factor, rel=0.03)
    assert not found.at_bound


def test_likelihood_is_flat_at_the_temperature_and_worse_beside_it() -> None:
    logits, labels = simulated(300)
    found = fit_temperature(3 * logits, labels)
    p = at_temperature(3 * logits, found.value)
    # the derivative by 1 / T: the mean logit under the probabilities is that of the labels
    assert (p * logits).sum(1).mean() == pytest.approx(logits[np.arange(300), labels].mean(), abs=1e-7)
    assert found.nll == pytest.approx(log_loss(labels, p, labels=range(5)))
    for factor in (0.9, 1.1):
        assert log_loss(labels, at_temperature(3 * logits, found.value * factor), labels=range(5)) > found.nll


def test_scaled_probabilities_are_the_softmax_written_out() -> None:
    p = at_temperature(np.array([[1.0, 2.0, -np.inf]]), 2.0)
    assert p[0].tolist() == pytest.approx([1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-0.5)), 0.0])


def test_logarithms_of_probabilities_give_the_temperature_of_the_logits() -> None:
    logits, labels = simulated(500)
    found = [fit_temperature(given, labels).value for given in (logits, log_softmax(logits, axis=1), logits + 1e3)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("low", [-np.inf, -1e9, -1e300])
def test_classes_that_the_classifier_does_not_know_change_nothing(low: float) -> None:
    logits, labels = simulated(500)
    expected = fit_temperature(3 * logits, labels)
    with_a_sixth = np.vstack([np.hstack([3 * logits, np.full((500, 1), low)]), np.r_[np.zeros(5), low]])
    found = fit_temperature(with_a_sixth, np.r_[labels, 5])
    assert (found.value, found.nll) == (pytest.approx(expected.value), pytest.approx(expected.nll))


@pytest.mark.parametrize("margin", [0.1, 5.0, 100.0])
def test_separable_images_end_at_the_lower_bound_and_say_so(margin: float) -> None:
    found = fit_temperature(margin * np.eye(4), np.arange(4))
    assert (found.value, found.at_bound) == (pytest.approx(math.exp(-5)), True)


def test_logits_that_are_always_wrong_end_at_the_upper_bound_and_say_so() -> None:
    found = fit_temperature(5 * np.eye(4), np.array([1, 2, 3, 0]))
    assert (found.value, found.at_bound) == (pytest.approx(math.exp(5)), True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(LgpError, match="got NaN or inf"):
        fit_temperature(np.array([[0.0, bad]]), np.array([0]))


@pytest.mark.parametrize("images", [0, 3])
def test_no_image_with_a_possible_label_is_an_error(images: int) -> None:
    with pytest.raises(LgpError, match=f"none of {images} images"):
        fit_temperature(np.tile([0.0, -np.inf], (images, 1)), np.ones(images, dtype=np.int64))


def test_brier_score_is_the_squared_distance_summed_over_classes() -> None:
    logits, labels = simulated(50)
    p = softmax(logits, axis=1)
    slow = sum((p[i, c] - (labels[i] == c)) ** 2 for i in range(50) for c in range(5)) / 50
    assert brier_score(p, labels) == pytest.approx(slow)
    assert brier_score(np.eye(3), np.array([0, 1, 1])) == pytest.approx(2 / 3)


def test_brier_score_of_two_classes_is_twice_scikit_learns() -> None:
    logits, labels = simulated(50, classes=2)
    p = softmax(logits, axis=1)
    assert brier_score(p, labels) == pytest.approx(2 * brier_score_loss(labels, p[:, 1]))


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.95, 1.0])
def test_accuracy_at_coverage_is_that_of_the_most_confident_images(coverage: float) -> None:
    logits, labels = simulated(100)
    p = softmax(logits, axis=1)
    order = sorted(range(100), key=lambda i: -max(p[i]))[: round(100 * coverage)]
    right = sum(p[i].argmax() == labels[i] for i in order)
    assert accuracy_at_coverage(p, labels, coverage) == pytest.approx(100 * right / len(order))


def test_accuracy_at_coverage_does_not_depend_on_the_order_of_equally_confident_images() -> None:
    p = np.array([[0.9, 0.1]] * 2 + [[0.8, 0.2]] * 4)
    labels = np.array([0, 0, 0, 0, 0, 1])
    # both of 90 %, and one of the four of 80 %, of which three are right
    expected = pytest.approx(100 * 2.75 / 3)
    assert accuracy_at_coverage(p, labels, 0.5) == expected
    assert accuracy_at_coverage(p[::-1], labels[::-1], 0.5) == expected


def test_coverage_of_less_than_an_image_takes_one() -> None:
    assert accuracy_at_coverage(np.array([[0.6, 0.4], [0.1, 0.9]]), np.array([1, 1]), 0.01) == 100


def test_points_of_the_diagram_equal_a_slow_loop_and_add_up_to_the_error() -> None:
    logits, labels = simulated(300, seed=2)
    p = at_temperature(logits, 0.4)
    points = reliability(*confidence_of(p, labels))
    expected = []
    for b in range(15):
        of_bin = [i for i in range(300) if b / 15 < p[i].max() <= (b + 1) / 15]
        if of_bin:
            right = np.mean([p[i].argmax() == labels[i] for i in of_bin])
            expected.append((np.mean([p[i].max() for i in of_bin]), right, len(of_bin)))
    found = list(zip(points.confidence, points.accuracy, points.count, strict=True))
    assert len(found) == len(expected) < 15
    assert np.allclose(found, expected)
    ece = 100 * sum(count * abs(right - confidence) for confidence, right, count in expected) / 300
    assert calibration_error(p, labels) == pytest.approx(ece)


def test_interval_is_the_basic_bootstrap_of_a_slow_loop() -> None:
    logits, labels = simulated(150)
    p, rng = at_temperature(logits, 0.3), np.random.default_rng(5)
    bins = [math.ceil(max(of_image) * 15) - 1 for of_image in p]
    gaps = [float(of_image.argmax() == label) - max(of_image) for of_image, label in zip(p, labels, strict=True)]

    def error_of(rows: list[int]) -> float:
        sums = [0.0] * 15
        for i in rows:
            sums[bins[i]] += gaps[i]
        return 100 * sum(map(abs, sums)) / len(rows)

    error = error_of(list(range(150)))
    drawn = [error_of(rng.integers(150, size=150).tolist()) for _ in range(2000)]
    low, high = interval(p, labels, seed=0)
    # the quantile of 1,000 draws is known to about a tenth of the deviation
    loose = 0.4 * np.std(drawn)
    assert low == pytest.approx(2 * error - np.quantile(drawn, 0.975), abs=loose)
    assert high == pytest.approx(2 * error - np.quantile(drawn, 0.025), abs=loose)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_interval_holds_the_measured_error(temperature: float) -> None:
    for seed in range(20):
        logits, labels = simulated(25, seed=seed)
        p = at_temperature(logits, temperature)
        low, high = interval(p, labels, seed)
        assert 0 <= low <= calibration_error(p, labels) <= high


def test_low_end_is_zero_only_where_calibrated_probabilities_could_be_that_far_off() -> None:
    logits, labels = simulated(1000)
    assert interval(softmax(logits, axis=1), labels, 0)[0] == 0
    assert interval(at_temperature(logits, 0.5), labels, 0)[0] > 1


def test_interval_depends_on_its_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = simulated(150)
    p = at_temperature(logits, 0.3)
    assert interval(p, labels, 0) == interval(p, labels, 0)
    assert interval(p, labels, 0) != interval(p, labels, 1)
    expected = interval(p, labels, 0)
    monkeypatch.setattr("lgp.evaluate.calibration.BLOCK", 150 * 7)
    assert interval(p, labels, 0) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.3])
def test_interval_holds_the_true_error_about_as_often_as_it_says(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgp.evaluate.calibration.DRAWS", 200)
    logits, labels = simulated(400_000, seed=9)
    p = at_temperature(logits, temperature)
    # the expected right predictions instead of drawn ones: of a calibrated classifier exactly 0
    confidence = p.max(1)
    bins = np.ceil(confidence * 15).astype(int)
    truth = 100 * np.abs(np.bincount(bins, softmax(logits, axis=1).max(1) - confidence)).sum() / len(p)
    held = 0
    for run in range(300):
        rows = slice(360 * run, 360 * (run + 1))
        low, high = interval(p[rows], labels[rows], seed=run)
        held += low <= truth <= high
    assert 0.87 <= held / 300 <= 0.99


def test_logits_in_single_precision_serve_too() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 3)).astype(np.float32), rng.integers(0, 3, 200)
    assert fit_temperature(logits, labels).value == fit_temperature(logits.astype(np.float64), labels).value
    assert at_temperature(logits, 2.0).dtype == np.float64


def test_interval_of_several_classifiers_is_that_of_their_mean_error() -> None:
    """Twice the same classifier is as one, and of two the interval lies around the mean."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, (2, 400))
    correct = (rng.random((2, 400)) < confidence - np.array([[0.0], [0.3]])).astype(float)
    one, other = (calibration_interval(confidence[[i]], correct[[i]], 0) for i in (0, 1))
    assert calibration_interval(confidence[[1, 1]], correct[[1, 1]], 0) == pytest.approx(other)
    both = calibration_interval(confidence, correct, 0)
    assert both == pytest.approx(np.mean([one, other], axis=0), rel=0.5)
    assert one[1] < both[1] < other[1]
