"""Statistics of results: intervals over subsets and images together, paired comparison, calibration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
STEP = 1e-9  # of a difference in accuracy: far below one image
CALIBRATION_BINS = 15  # Guo et al. 2017


def accuracy_interval(correct: np.ndarray) -> tuple[float, float]:
    """Return low and high of the 95 % interval of an accuracy, in percent, for other test images and other subsets.

    The interval is Wilson's (1927), which has a width at 100 % too. Several subsets of labels share their test images.
    They count as the number of independent images that has their variance, with Student's t (`_worth`).

    Args:
        correct: (subsets, images) bool, which predictions are right.
    """
    worth = _worth(correct.astype(np.float64), (0.0, 1.0))
    share, n, t = float(correct.mean()), worth.images, worth.quantile
    middle, half = share + t**2 / (2 * n), t * math.sqrt(share * (1 - share) / n + t**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + t**2 / n) for sign in (-1, 1))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


@dataclass(frozen=True)
class Gap:
    """How far one arm is ahead of another, in points of accuracy.

    Attributes:
        points: mean difference.
        low: lower end of its 95 % interval.
        high: upper end.
        p: p-value of a tie, two-sided; below 0.05 exactly where the interval excludes a tie.
        won: number of subsets in which the first arm is ahead.
        subsets: number of all subsets.
    """

    points: float
    low: float
    high: float
    p: float
    won: int
    subsets: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes a tie."""
        return self.low > 0 or self.high < 0

    def signed(self) -> str:
        """Return the points with their sign, and the interval."""
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def paired_gap(a: np.ndarray, b: np.ndarray) -> Gap:
    """Compare two arms on the same subsets and test images.

    Interval and p-value are of the score test for paired proportions (Tango 1998; at a tie McNemar's test without
    correction). Both exist where the arms agree on every image. Several subsets count as the number of independent
    images that has their variance, with Student's t (`_worth`).

    The interval holds for other subsets and other test images. It holds for these two encoders only.

    Args:
        a: (subsets, images) bool, whether the first arm is right.
        b: the same for the second arm.
    """
    difference = a.astype(np.float64) - b.astype(np.float64)
    worth = _worth(difference, (-1.0, 1.0))
    only_a, only_b = (worth.images * float(np.mean(difference == sign)) for sign in (1, -1))
    low, high = _tango(only_a, only_b, worth)
    z = (only_a - only_b) / math.sqrt(only_a + only_b) if only_a + only_b else 0.0
    p = 2 * float(stats.t.sf(abs(z), worth.freedom))
    won = int((difference.mean(axis=1) > 0).sum())
    return Gap(100 * float(difference.mean()), 100 * low, 100 * high, p, won, len(difference))


def students_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return low and high of the 95 % interval of the mean of independent values, e.g. one per seed (Student's t)."""
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of comparisons (Holm 1979).

    Below 0.05 are those that may all be claimed together: the chance that any one of them is false is at most 5 %.
    """
    order = np.argsort(p)
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(order), 0, -1)).clip(max=1.0)
    return [float(value) for value in adjusted]


@dataclass(frozen=True)
class _Worth:
    """The number of independent images that predictions are worth, and the degrees of freedom of their variance."""

    images: float
    freedom: float

    @property
    def quantile(self) -> float:
        """Student's t of a 95 % interval; the normal quantile where the freedom is infinite."""
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.freedom))


def _worth(values: np.ndarray, ends: tuple[float, float]) -> _Worth:
    """Return what a table of values is worth: the number of independent images whose mean varies as much as its mean.

    One subset is worth its images. Several are worth less where subsets differ, and more where an image that one
    subset gets wrong is right in others (Korn and Graubard 1998, effective sample size).

    Two images are added for the variance, one with each of `ends` in every subset. A few mistakes, or none, therefore
    count as mistakes of images that all subsets share (as in Agresti and Min 2005).

    Args:
        values: (subsets, images).
        ends: the lowest and the highest value.
    """
    subsets, images = values.shape
    if subsets == 1:
        return _Worth(images, math.inf)
    padded = np.hstack([values, np.tile(ends, (subsets, 1))])
    variance, freedom = _two_way(padded)
    return _Worth(images * float(padded.var()) / (images + 1) / variance, freedom)


def _two_way(values: np.ndarray) -> tuple[float, float]:
    """Return the variance of the mean of a table, and its degrees of freedom (Satterthwaite).

    Both subsets and images are drawn at random (two-way random effects). The variance is that between images, plus
    that between subsets, minus what both contain of their interaction.

    Args:
        values: (subsets, images), two or more of each, not all equal.
    """
    subsets, images = values.shape
    of_image, of_subset = values.mean(axis=0), values.mean(axis=1)
    residual = values - of_image - of_subset[:, None] + values.mean()
    of_residual = (residual**2).sum() / ((subsets - 1) * (images - 1)) / (subsets * images)
    by_images, by_subsets = of_image.var(ddof=1) / images, of_subset.var(ddof=1) / subsets
    variance = by_images + max(by_subsets - of_residual, 0.0)
    freedom = variance**2 / (by_images**2 / (images - 1) + by_subsets**2 / (subsets - 1))
    return float(variance), max(float(freedom), subsets - 1)


def _tango(only_a: float, only_b: float, worth: _Worth) -> tuple[float, float]:
    """Return Tango's (1998) interval of the difference of two paired proportions.

    It has the differences d that the score test accepts: those with (only_a - only_b - n d)² ≤ t² n V(d), where V uses
    the most likely share of `only_b` under d.

    Args:
        only_a: number of images that only the first arm gets right.
        only_b: number of images that only the second gets right.
        worth: number of all images n, and the quantile t.
    """
    n, t = worth.images, worth.quantile
    measured = (only_a - only_b) / n

    def excess(d: float) -> float:
        b = (2 * n - only_a + only_b) * d - only_a - only_b
        share = (math.sqrt(max(b**2 + 8 * n * only_b * d * (1 - d), 0.0)) - b) / (4 * n)
        return (measured - d) ** 2 - t**2 * max(2 * share + d * (1 - d), 0.0) / n

    # at a measured difference of 0 without any disagreement `excess` is 0 too: the search starts beside it
    low, high = (
        optimize.brentq(excess, measured + side * STEP, side) if abs(measured - side) > STEP else side
        for side in (-1.0, 1.0)
    )
    return low, high


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error in percent (Guo et al. 2017, equation 3), over 15 equal bins.

    Args:
        probabilities: (N, C).
        labels: (N,).
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    gap = np.bincount(calibration_bins(confidence), correct.astype(float) - confidence)
    return 100 * float(np.abs(gap).sum() / len(labels))


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """Return the number of the bin of each confidence. Bin b, counted from 0, holds those in (b / 15, (b + 1) / 15]."""
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
