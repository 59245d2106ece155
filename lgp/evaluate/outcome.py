"""The outcome of an evaluation: flat metrics, and a prediction for each test image and subset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import top_k_accuracy_score

from lgp.evaluate.statistics import calibration_error, mean_std_ci95

Metrics = Mapping[str, float]

TOP5_FROM = 10  # fewest classes with which top-5 is reported


@dataclass(frozen=True)
class Outcome:
    """Flat metrics of one task, in percent, and a row per test image (and subset) with the prediction."""

    metrics: dict[str, float]
    predictions: pd.DataFrame


@dataclass(frozen=True)
class Scored:
    """The scores of a classifier, and a row per test image (id, label, prediction, confidence)."""

    scores: Mapping[str, float]
    table: pd.DataFrame


@dataclass(frozen=True)
class Predicted:
    """Probabilities (N, classes) of a classifier on val and on test, with labels and ids of the images."""

    probabilities: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    ids: Mapping[str, np.ndarray]

    def scored(self) -> Scored:
        """Score top-1 on test and val. Score top-5 (with ten classes or more) and the calibration error on test."""
        test, labels = self.probabilities["test"], self.labels["test"]
        scores = {f"{s}/top1": percent(self.probabilities[s].argmax(1) == self.labels[s]) for s in ("test", "val")}
        classes = test.shape[1]
        if classes >= TOP5_FROM:
            top5 = top_k_accuracy_score(labels, test, k=5, labels=np.arange(classes))
            scores["test/top5"] = round(100 * float(top5), 4)
        scores["test/ece"] = round(calibration_error(test, labels), 4)
        table = {"id": self.ids["test"], "label": labels, "prediction": test.argmax(1).astype(np.int64)}
        return Scored(scores, pd.DataFrame(table | {"confidence": test.max(1).astype(np.float32)}))


def over_subsets(of_subset: Sequence[Scored], labels: int) -> Outcome:
    """Summarise a task over subsets of labels: mean, standard deviation and 95 % interval of every score.

    Args:
        of_subset: scores of the classifier of each subset.
        labels: number of labelled images in each subset.
    """
    scores = [scored.scores for scored in of_subset]
    metrics: dict[str, float] = {}
    for name in scores[0]:
        values = [score[name] for score in scores]
        if len(values) == 1:
            metrics[name] = values[0]
            continue
        mean, std, ci95 = mean_std_ci95(values)
        metrics |= {name: round(mean, 4), f"{name}_std": round(std, 4), f"{name}_ci95": round(ci95, 4)}
    if len(scores) > 1:
        metrics |= {f"test/top1_subset{number}": score["test/top1"] for number, score in enumerate(scores)}
    metrics |= {"labels": float(labels), "subsets": float(len(scores))}
    tables = [scored.table.assign(subset=number) for number, scored in enumerate(of_subset)]
    return Outcome(metrics, pd.concat(tables, ignore_index=True))


def percent(correct: np.ndarray) -> float:
    """Return how many values are True, in percent."""
    return round(100 * float(np.mean(correct)), 4)
