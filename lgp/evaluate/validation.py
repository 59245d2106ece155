"""How much a validation part can decide."""

import numpy as np

from lgp.evaluate.statistics import accuracy_interval

# Arms and settings that are worth choosing between differ by a few points, seldom by ten. From 93 images on, the 95 %
# interval of an accuracy of 50 % reaches less than ten points to either side.
MOST_POINTS = 10.0


def small_validation(images: int) -> str:
    """Warn of a validation part that is too small to choose by; return nothing where it is large enough."""
    if not images:
        return "val has no image, so nothing can be chosen on it (rates, strengths, the leader): raise data.val_share"
    low, high = accuracy_interval((np.arange(images) % 2 == 0)[None])
    if (high - low) / 2 <= MOST_POINTS:
        return ""
    return (
        f"val has {images} images, so an accuracy of 50 % on it has the 95 % interval [{low:.0f}, {high:.0f}]. What is "
        "chosen on it (rates, strengths, the leader) is chosen by chance: raise data.val_share"
    )
