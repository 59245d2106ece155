"""The outcome of an evaluation: flat metrics, and a prediction for each test image and subset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lgp.evaluate.calibration import accuracy_at_coverage, at_temperature, brier_score, fit_temperature
from lgp.evaluate.statistics import accuracy_interval, calibration_error
from lgp.models.classifier_folder import Classifier

Metrics = Mapping[str, float]

TOP5_FROM = 10  # fewest classes with which top-5 is reported
COVERAGES = (50, 80, 95)  # percent of the images, the surest first
CALIBRATED_ON = 20  # fewest images that a temperature is fitted to


@dataclass(frozen=True)
class Outcome:
    """Flat metrics of one task, in percent, and a row per test image (and subset) with the prediction.

    `classifier` is the one that is kept: of several subsets, that of the best accuracy on val.
    """

    metrics: dict[str, float]
    predictions: pd.DataFrame
    classifier: Classifier | None = None


@dataclass(frozen=True)
class Scored:
    """The scores of a classifier in percent, and a row per test image (id, label, prediction, confidence).

    Attributes:
        scores: all scores by name.
        correct: for each score that is an accuracy, which images are right, (images,) bool.
        table: a row per test image.
    """

    scores: Mapping[str, float]
    correct: Mapping[str, np.ndarray]
    table: pd.DataFrame


@dataclass(frozen=True)
class Predicted:
    """Probabilities (N, classes) of a classifier on val and on test, with labels and ids of the images."""

    probabilities: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    ids: Mapping[str, np.ndarray]

    def scored(self) -> Scored:
        """Score top-1 on test and val; on test also top-5 (with ten classes or more), and how sure it may be.

        The Brier score on val tells apart what has one accuracy there.
        """
        test, labels = self.probabilities["test"], self.labels["test"]
        correct = {f"{s}/top1": self.probabilities[s].argmax(1) == self.labels[s] for s in ("test", "val")}
        if test.shape[1] >= TOP5_FROM:
            five = np.argsort(test, axis=1, kind="stable")[:, -5:]
            correct["test/top5"] = (five == labels[:, None]).any(axis=1)
        scores = {name: percent(of_images) for name, of_images in correct.items()}
        scores |= _believed(test, labels) if len(labels) else {}
        scores["val/brier"] = round(brier_score(self.probabilities["val"], self.labels["val"]), 4)
        table = {"id": self.ids["test"], "label": labels, "prediction": test.argmax(1).astype(np.int64)}
        return Scored(scores, correct, pd.DataFrame(table | {"confidence": test.max(1).astype(np.float32)}))


def _believed(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return how far probabilities can be believed: calibration error, Brier score, accuracy of the surest images."""
    scores = {"test/ece": calibration_error(probabilities, labels), "test/brier": brier_score(probabilities, labels)}
    scores |= {f"test/top1_of_surest_{c}": accuracy_at_coverage(probabilities, labels, c / 100) for c in COVERAGES}
    return {name: round(value, 4) for name, value in scores.items()}


@dataclass(frozen=True)
class Logits:
    """Logits (N, classes) of a classifier on val and on test, with labels and ids of the images."""

    of: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    ids: Mapping[str, np.ndarray]

    @property
    def finite(self) -> bool:
        """Whether all logits are numbers."""
        return all(bool(np.isfinite(of_split).all()) for of_split in self.of.values())

    def at(self, temperature: float) -> Predicted:
        """Return the probabilities at a temperature."""
        probabilities = {split: at_temperature(logits, temperature) for split, logits in self.of.items()}
        return Predicted(probabilities, self.labels, self.ids)

    def temperature_on_val(self) -> float:
        """Return the temperature that val asks for."""
        return usable_temperature(self.of["val"], self.labels["val"])

    def scored(self, temperature: float) -> Scored:
        """Score the calibrated probabilities. The calibration error without the temperature is among the scores."""
        scored, labels = self.at(temperature).scored(), self.labels["test"]
        before = {}
        if len(labels):
            before["test/ece_uncalibrated"] = round(calibration_error(self.at(1.0).probabilities["test"], labels), 4)
        return replace(scored, scores={**scored.scores, **before, "temperature": temperature})


def usable_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that images ask for which the classifier was not fitted to, 1 if these are too few.

    They are too few below `CALIBRATED_ON`, and where no temperature is the best: where all are right, for example.
    """
    if len(labels) < CALIBRATED_ON:
        return 1.0
    found = fit_temperature(logits, labels)
    return 1.0 if found.at_bound else round(found.value, 6)


def rank_on_val(metrics: Metrics) -> tuple[float, float]:
    """Return what one of several classifiers is chosen by, the greatest first.

    The accuracy on val decides. With few validation images many classifiers are equal there. Then the one whose
    probabilities are better is taken (the lower Brier score on val).
    """
    return metrics["val/top1"], -metrics["val/brier"]


def best_on_val(of_subset: Sequence[Scored]) -> int:
    """Return the number of the classifier that is best by `rank_on_val`. It is the first of equal ones."""
    return max(range(len(of_subset)), key=lambda number: rank_on_val(of_subset[number].scores))


def over_subsets(of_subset: Sequence[Scored], labels: int, kept: Classifier | None = None) -> Outcome:
    """Summarise a task over subsets of labels: mean, standard deviation, and the 95 % interval of every accuracy.

    Args:
        of_subset: scores of the classifier of each subset.
        labels: number of labelled images in each subset.
        kept: the classifier of the subset that is best on val.
    """
    metrics: dict[str, float] = {}
    for name in of_subset[0].scores:
        values = [scored.scores[name] for scored in of_subset]
        if name in of_subset[0].correct:
            metrics |= accuracy_metrics(name, np.stack([scored.correct[name] for scored in of_subset]))
        else:
            metrics[name] = round(float(np.mean(values)), 4)
        if len(values) > 1:
            metrics[f"{name}_std"] = round(float(np.std(values, ddof=1)), 4)
    if len(of_subset) > 1:
        metrics |= {f"test/top1_subset{number}": scored.scores["test/top1"] for number, scored in enumerate(of_subset)}
    metrics |= {"labels": float(labels), "subsets": float(len(of_subset))}
    tables = [scored.table.assign(subset=number) for number, scored in enumerate(of_subset)]
    return Outcome(metrics, pd.concat(tables, ignore_index=True), kept)


def accuracy_metrics(name: str, correct: np.ndarray) -> dict[str, float]:
    """Return an accuracy in percent, and low and high of its 95 % interval as `NAME_low` and `NAME_high`.

    Args:
        name: of the metric.
        correct: (subsets, images) bool, which predictions are right.
    """
    low, high = accuracy_interval(correct)
    return {name: percent(correct), f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}


def percent(correct: np.ndarray) -> float:
    """Return how many values are True, in percent."""
    return round(100 * float(np.mean(correct)), 4)
