"""Which images came, went or changed since the last `lgp prepare` of this project.

Two numbers of 64 bits per image are kept: a hash of its path, and the first bytes of the digest of its pixels.
"""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd


def kept_images(index: pd.DataFrame) -> np.ndarray:
    """Return what is kept of the prepared images: (N, 2) uint64, sorted, of path and pixels."""
    paths = b"".join(sha256(path.encode("utf-8", "backslashreplace")).digest()[:8] for path in index["path"])
    pixels = b"".join(content[:8] for content in index["content"])
    both = np.stack([np.frombuffer(hashes, dtype=">u8").astype(np.uint64) for hashes in (paths, pixels)], axis=1)
    return both[np.argsort(both[:, 0], kind="stable")]


def changes(before: np.ndarray, now: np.ndarray) -> str:
    """Say how many images came, went and changed, with `now` the later one. Both are of `kept_images`."""
    stayed, old, new = np.intersect1d(before[:, 0], now[:, 0], assume_unique=True, return_indices=True)
    changed = int((before[old, 1] != now[new, 1]).sum())
    came, went = len(now) - len(stayed), len(before) - len(stayed)
    if not came + went + changed:
        return "the same images as before"
    return f"since the last time, {came} images came, {went} went, {changed} changed"


def read_kept(file: Path) -> np.ndarray | None:
    """Read what was kept. Return None where there is nothing of use: the next run says nothing, and keeps it anew."""
    try:
        kept = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    return kept if kept.dtype == np.uint64 and kept.ndim == 2 and kept.shape[1] == 2 else None
