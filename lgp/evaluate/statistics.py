"""What a number is worth: intervals over subsets and images, paired comparison, calibration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
RESAMPLES_AT_ONCE = 2**24  # counts of images that are drawn together
CONFIDENCE = 0.95
CALIBRATION_BINS = 15  # Guo et al. 2017


def mean_std_ci95(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, standard deviation (of n - 1) and half the 95 % interval of the mean (Student's t).

    Args:
        values: two or more, independent: a subset of labels each, or a pre-training seed.
    """
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return float(np.mean(values)), std, half


def accuracy_ci95(accuracy: float, images: int) -> float:
    """Return half the 95 % interval of an accuracy in percent, measured on so many images (normal approximation)."""
    share = accuracy / 100
    return 100 * float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(share * (1 - share) / images)


@dataclass(frozen=True)
class Gap:
    """How far one arm is ahead of another, in points of accuracy, with its 95 % interval.

    Attributes:
        points: mean difference.
        low: lower end of the interval.
        high: its upper end.
        won: in how many subsets the first was ahead.
        subsets: of how many.
    """

    points: float
    low: float
    high: float
    won: int
    subsets: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes a tie."""
        return self.low > 0 or self.high < 0

    def sentence(self, a: str, b: str) -> str:
        """Say it as `A beats B by x ± y points`."""
        half = f"{abs(self.points):.1f} ± {(self.high - self.low) / 2:.1f} points"
        if not self.decided:
            return f"{a} and {b} are level: {'+' if self.points >= 0 else '−'}{half}"
        return f"{a} beats {b} by {half}" if self.points > 0 else f"{b} beats {a} by {half}"


def paired_gap(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Gap:
    """Compare two arms on the same subsets and test images, by the bootstrap.

    Subsets and images are drawn anew with replacement, both at once and the same for both arms (Efron and Tibshirani
    1993, section 13.3, percentiles): so the interval speaks of other subsets and other test images, of the same
    two encoders.

    Args:
        a: (subsets, images) bool, whether the first arm is right.
        b: the same of the second.
        seed: of the draws.
    """
    difference = 100 * (a.astype(np.float64) - b.astype(np.float64))
    subsets, images = difference.shape
    rng = np.random.default_rng(seed)
    gaps: list[np.ndarray] = []
    at_once = max(RESAMPLES_AT_ONCE // images, 1)
    for start in range(0, RESAMPLES, at_once):
        draws = min(at_once, RESAMPLES - start)
        of_subsets = rng.multinomial(subsets, np.full(subsets, 1 / subsets), draws)
        of_images = rng.multinomial(images, np.full(images, 1 / images), draws)
        gaps.append(((of_subsets @ difference) * of_images).sum(axis=1) / (subsets * images))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(gaps), [tail, 1 - tail])
    of_subset = difference.mean(axis=1)
    return Gap(float(of_subset.mean()), float(low), float(high), int((of_subset > 0).sum()), subsets)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error in percent (Guo et al. 2017, equation 3), over 15 equal bins.

    Args:
        probabilities: (N, C).
        labels: (N,).
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gap = np.bincount(bins, correct.astype(float) - confidence, minlength=CALIBRATION_BINS)
    return 100 * float(np.abs(gap).sum() / len(labels))
