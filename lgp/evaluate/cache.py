"""Features once: each array of an encoder, a split and a block lies in a file, named by what decides its content.

Every task on frozen features reads from here, by memory map: features of ImageNet (1.28 million × 768, 2 GB in half
precision) need no more memory than a batch.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock

from lgp.data.prepared import Prepared
from lgp.errors import check_disk_space
from lgp.evaluate.features import BATCH, Encode, extracted, pixels
from lgp.params import FeatureParams

SPLITS = ("train", "val", "test")
FORMAT = 1  # of the files and of what is computed into them: raise it when either changes
COMPUTED_WITH = ("torch", "timm")  # whose versions move the last digits
ROWS = 2**16  # that are read at once
GIB = 2**30


@dataclass(frozen=True)
class FeatureSource:
    """What turns images into features.

    Attributes:
        digest: of everything that decides the features of an image: weights, configuration, how they are pooled.
        blocks: how many features an image has, one after each of the last blocks; 1 for a baseline.
        encode: opens it: normalised images (B, C, S, S) → (B, blocks, D). Called where features are missing.
    """

    digest: str
    blocks: int
    encode: Callable[[], Encode]


def pixel_source() -> FeatureSource:
    """Raw pixels as features of one block."""
    return FeatureSource("pixels", 1, lambda: lambda images: pixels(images)[:, None])


@dataclass(frozen=True)
class Features:
    """Raw features of train, val and test, memory-mapped, with labels and ids.

    `x` is (N, D) each, D of all the chosen blocks together; `by_block` the same after each block alone.
    """

    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]
    classes: int
    by_block: dict[str, list[np.ndarray]]


class FeatureCache:
    """A folder of arrays, at most of a given size: what was not read for longest goes first."""

    def __init__(self, folder: Path, params: FeatureParams, cache_gib: float) -> None:
        """Keep up to `cache_gib` of features in `folder`, as `params` say."""
        self.folder, self.params, self.cache_gib = folder, params, cache_gib

    def features(self, source: FeatureSource, data: Prepared) -> Features:
        """Return the features of a source for all three splits, extracted where they are not there yet."""
        ids = {split: data.ids(split) for split in SPLITS}
        stored = {split: self._stored(source, data, split, of_split) for split, of_split in ids.items()}
        x = {split: self._joined(entry) for split, (entry, _) in stored.items()}
        by_block = {split: arrays for split, (_, arrays) in stored.items()}
        return Features(x, {s: data.labels[i] for s, i in ids.items()}, ids, len(data.classes), by_block)

    def _stored(
        self, source: FeatureSource, data: Prepared, split: str, ids: np.ndarray
    ) -> tuple[Path, list[np.ndarray]]:
        """Return the entry of a split, and its (N, D) after each stored block."""
        decided_by = [
            FORMAT,
            source.digest,
            data.meta["digest"],
            split,
            self.params.dtype,
            *map(version, COMPUTED_WITH),
        ]
        entry = self.folder / sha256(json.dumps(decided_by).encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        # of several evaluations of one encoder the first extracts, the others wait and read
        with FileLock(self.folder / "extracting.lock"):
            if not entry.exists():
                self._extract(source, data, ids, entry)
            entry.touch()
            return entry, [_mapped(entry / f"{block}.npy") for block in range(source.blocks)]

    def _joined(self, entry: Path) -> np.ndarray:
        """Return the features of the last `blocks` blocks together, (N, D of all), also memory-mapped."""
        last = sorted(entry.glob("[0-9]*.npy"), key=lambda path: int(path.stem))[-self.params.blocks :]
        if len(last) == 1:
            return _mapped(last[0])
        path = entry / f"last{len(last)}.npy"
        if not path.exists():
            arrays = [_mapped(file) for file in last]
            shape = (len(arrays[0]), sum(a.shape[1] for a in arrays))
            partial = path.with_suffix(".partial")
            joined = np.lib.format.open_memmap(partial, mode="w+", dtype=self.params.dtype, shape=shape)
            for start in range(0, shape[0], ROWS):
                joined[start : start + ROWS] = np.concatenate([a[start : start + ROWS] for a in arrays], axis=1)
            joined.flush()
            partial.replace(path)
        return _mapped(path)

    def _extract(self, source: FeatureSource, data: Prepared, ids: np.ndarray, entry: Path) -> None:
        for stale in self.folder.glob("*.partial"):
            shutil.rmtree(stale)
        partial = entry.with_suffix(".partial")
        partial.mkdir()
        arrays: Sequence[np.memmap] = []
        for number, batch in enumerate(extracted(source.encode(), data, ids)):
            if not arrays:
                shape = (len(ids), batch.shape[2])
                wanted = source.blocks * shape[0] * shape[1] * np.dtype(self.params.dtype).itemsize
                self._make_room(wanted)
                check_disk_space(self.folder, wanted)
                arrays = [
                    np.lib.format.open_memmap(partial / f"{b}.npy", mode="w+", dtype=self.params.dtype, shape=shape)
                    for b in range(source.blocks)
                ]
            for block, array in enumerate(arrays):
                array[number * BATCH : number * BATCH + len(batch)] = batch[:, block]
        for array in arrays:
            array.flush()
        partial.replace(entry)

    def _make_room(self, wanted: int) -> None:
        """Remove the entries that were not read for longest, until `wanted` bytes more fit into the budget."""
        entries = sorted(
            (p for p in self.folder.iterdir() if p.is_dir() and not p.suffix), key=lambda p: p.stat().st_mtime
        )
        sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
        used = sum(sizes.values())
        for entry in entries:
            if used + wanted <= self.cache_gib * GIB:
                return
            shutil.rmtree(entry)
            used -= sizes[entry]


def _mapped(path: Path) -> np.ndarray:
    # copy on write: torch wants arrays that it may write to, the file stays as it is
    array: np.ndarray = np.load(path, mmap_mode="c")
    return array


def standardizer(reference: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map to zero mean and unit deviation per feature, measured on `reference` (N, D).

    Features that do not vary there are only centred. `reference` may be memory-mapped: it is read in blocks.
    """
    # in single precision the mean of a constant misses it by a little, which the division would blow up to 1
    blocks = [reference[start : start + ROWS] for start in range(0, len(reference), ROWS)]
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / len(reference)
    squares = sum(((block - mean) ** 2).sum(axis=0) for block in blocks)
    std = np.sqrt(squares / len(reference))
    std[std < 1e-6] = 1.0
    return lambda features: ((features - mean) / std).astype(np.float32)


def normalizer(_reference: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map of each image's features to zero mean and length 1, as the paper's released code does it."""

    def normalize(features: np.ndarray) -> np.ndarray:
        centred = features - features.mean(axis=1, keepdims=True, dtype=np.float64)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        return (centred / np.maximum(length, 1e-12)).astype(np.float32)

    return normalize
