"""Alarms while a training runs: measures of the features that fall far below their best value."""

import math
from collections.abc import Sequence

KNN, RANK = "val/online_knn_top1", "val/effective_rank"
# the least that a measure keeps of its best: accuracy less these points, rank times this share
KNN_POINTS, RANK_SHARE = 10.0, 0.5
DEVIATIONS = 1.96  # of the difference of two accuracies of 50 %: 95 % of what chance does


def fallen(history: Sequence[dict[str, float]], images: int | None = None) -> list[str]:
    """Return a line for each measure of the last of some epochs that has just fallen.

    It falls once, when it passes below its bound: the best of the earlier epochs less 10 points of accuracy, or half
    the best effective rank. Accuracies of few images differ by more than 10 points by chance: then the bound is lower.
    An epoch without the measure counts for nothing.

    Args:
        history: the epochs.
        images: whose accuracy is measured. None: many.
    """
    chance = 0.0 if images is None else 100 * DEVIATIONS * math.sqrt(2 * 0.25 / images)
    bounds = {
        KNN: ("online k-NN accuracy", _best(history, KNN) - max(KNN_POINTS, chance)),
        RANK: ("the effective rank of the features", _best(history, RANK) * RANK_SHARE),
    }
    return [
        f"{said} fell from {_best(history, name):.4g}, its best, to {history[-1][name]:.4g}"
        for name, (said, bound) in bounds.items()
        if name in history[-1] and history[-1][name] < bound <= _before(history, name)
    ]


def _earlier(history: Sequence[dict[str, float]], name: str) -> list[float]:
    return [epoch[name] for epoch in history[:-1] if name in epoch]


def _best(history: Sequence[dict[str, float]], name: str) -> float:
    return max(_earlier(history, name), default=-math.inf)


def _before(history: Sequence[dict[str, float]], name: str) -> float:
    return next(reversed(_earlier(history, name)), -math.inf)
