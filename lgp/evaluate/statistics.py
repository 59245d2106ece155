"""Statistics of results: intervals over subsets and images, paired comparison, calibration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
CALIBRATION_BINS = 15  # Guo et al. 2017


def mean_std_ci95(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, standard deviation (of n - 1) and half the 95 % interval of the mean (Student's t).

    Args:
        values: two or more independent values, one per subset of labels or per pre-training seed.
    """
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * std / math.sqrt(len(values))
    return float(np.mean(values)), std, half


def accuracy_ci95(accuracy: float, images: int) -> float:
    """Return half the 95 % interval of an accuracy in percent, measured on `images` images (normal approximation)."""
    share = accuracy / 100
    return 100 * float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(share * (1 - share) / images)


@dataclass(frozen=True)
class Gap:
    """How far one arm is ahead of another, in points of accuracy, with its 95 % interval.

    Attributes:
        points: mean difference.
        low: lower end of the interval.
        high: its upper end.
        won: number of subsets in which the first arm is ahead.
        subsets: number of all subsets.
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
        """Compare arm `a` with the arm `b` behind it: `A beats B by x ± y points`, or that they are undecided."""
        verb = f"{a} beats {b} by" if self.decided else f"{a} and {b} are undecided: {a} is ahead by"
        return f"{verb} {self.points:.1f} ± {(self.high - self.low) / 2:.1f} points"


def paired_gap(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Gap:
    """Compare two arms on the same subsets and test images.

    The images are drawn with replacement, the same images for both arms (bootstrap). With one subset the interval is
    the percentiles of the bootstrap.

    Several subsets are too few for a bootstrap. The variance of the mean is the bootstrap variance over images plus a
    part from the choice of labels: the variance between subsets, minus what images explain of it (two-way random
    effects). The interval is Student's t with Satterthwaite's degrees of freedom.

    The interval holds for other subsets and other test images. It holds for these two encoders only.

    Args:
        a: (subsets, images) bool, whether the first arm is right.
        b: the same for the second arm.
        seed: of the bootstrap.
    """
    difference = 100 * (a.astype(np.float64) - b.astype(np.float64))
    subsets, images = difference.shape
    of_image, of_subset = difference.mean(axis=0), difference.mean(axis=1)
    points, won = float(difference.mean()), int((of_subset > 0).sum())
    # an image's mean difference has few possible values, so it suffices to draw how often each value occurs
    values, counts = np.unique(of_image, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(images, counts / images, RESAMPLES) @ values / images
    tail = (1 - CONFIDENCE) / 2
    if subsets == 1:
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Gap(points, float(low), float(high), won, subsets)
    residual = difference - of_image - of_subset[:, None] + points
    of_residual = (residual**2).sum() / ((subsets - 1) * (images - 1)) / (subsets * images)
    by_images, by_subsets = draws.var(), of_subset.var(ddof=1) / subsets
    variance = by_images + max(by_subsets - of_residual, 0.0)
    freedom = variance**2 / (by_images**2 / (images - 1) + by_subsets**2 / (subsets - 1)) if variance else images
    half = float(stats.t.ppf(1 - tail, max(freedom, subsets - 1))) * math.sqrt(variance)
    return Gap(points, points - half, points + half, won, subsets)


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
