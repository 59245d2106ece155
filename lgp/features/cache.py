"""Cached features: a file per encoder, split and block, in a folder named by a digest of what decides the content.

Every task on frozen features reads these files by memory map. Features of ImageNet (1.28 million × 768, 2 GB in half
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
from filelock import FileLock, Timeout

from lgp.data.labels import LabelledImages
from lgp.errors import check_disk_space
from lgp.features.extraction import BATCH, Encode, extracted, pixels
from lgp.params.evaluate import FeatureParams

EVALUATED_SPLITS = ("train", "val", "test")
FORMAT = 1  # version of the files and of their computation: raise it when either changes
COMPUTED_WITH = ("torch", "timm")  # their versions change the last digits
ROWS = 2**16  # read at once
GIB = 2**30


@dataclass(frozen=True)
class FeatureSource:
    """A source of features: the function from images to features, and its digest.

    Attributes:
        digest: of everything that decides the features of an image: weights, configuration, how they are pooled.
        blocks: number of features per image, one after each of the last blocks; 1 for raw pixels.
        encode: returns the function of normalised images (B, C, S, S) → (B, blocks, D). It is called if features are
            missing.
    """

    digest: str
    blocks: int
    encode: Callable[[], Encode]


def pixel_source() -> FeatureSource:
    """Return the source of raw pixels, as features of one block."""
    return FeatureSource("pixels", 1, lambda: lambda images: pixels(images)[:, None])


@dataclass(frozen=True)
class Features:
    """Raw features of train, val and test, memory-mapped, with labels and ids.

    `x` has an array (N, D) per split, D over all chosen blocks. `by_block` has such an array after each block alone.
    `params` says how they were made.
    """

    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]
    classes: int
    by_block: dict[str, list[np.ndarray]]
    params: FeatureParams


class FeatureCache:
    """A folder of entries, one per source and prepared data. Above a given size, the least recently read go first."""

    def __init__(self, folder: Path, params: FeatureParams, cache_gib: float) -> None:
        """Keep up to `cache_gib` GiB of features in `folder`, besides those in use. `params` sets their form."""
        self.folder, self.params, self.cache_gib = folder, params, cache_gib

    def features(self, source: FeatureSource, data: LabelledImages) -> Features:
        """Return the features of a source for all three splits. Missing features are extracted."""
        ids = {split: data.ids(split) for split in EVALUATED_SPLITS}
        # the labels decide which image is in which split
        of_ids = [sha256(of_split.tobytes()).hexdigest() for of_split in ids.values()]
        images = [data.meta["digest"], data.mean, data.std, *of_ids]
        decided_by = [FORMAT, source.digest, *images, self.params.dtype, *map(version, COMPUTED_WITH)]
        entry = self.folder / sha256(json.dumps(decided_by).encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        # the first of several evaluations of one encoder extracts; the others wait and read
        with FileLock(self._lock_of(entry)):
            if not entry.exists():
                self._extract(source, data, ids, entry)
            x = {split: self._joined(entry, split, source.blocks) for split in EVALUATED_SPLITS}
            by_block = {
                s: [_mapped(entry / f"{s}-{block}.npy") for block in range(source.blocks)] for s in EVALUATED_SPLITS
            }
            entry.touch()
        return Features(x, {s: data.labels[i] for s, i in ids.items()}, ids, len(data.classes), by_block, self.params)

    def _lock_of(self, entry: Path) -> Path:
        return entry.with_suffix(".lock")

    def _extract(self, source: FeatureSource, data: LabelledImages, ids: dict[str, np.ndarray], entry: Path) -> None:
        partial = entry.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir()
        encode = source.encode()
        images = sum(len(of_split) for of_split in ids.values())
        for split, of_split in ids.items():
            arrays: Sequence[np.memmap] = []
            for number, batch in enumerate(extracted(encode, data, of_split)):
                if not arrays:
                    shape = (len(of_split), batch.shape[2])
                    if split == EVALUATED_SPLITS[0]:
                        self._make_room(images * source.blocks * shape[1], entry)
                    arrays = [self._create(partial / f"{split}-{b}.npy", shape) for b in range(source.blocks)]
                for block, array in enumerate(arrays):
                    array[number * BATCH : number * BATCH + len(batch)] = batch[:, block]
            for array in arrays:
                array.flush()
        partial.replace(entry)

    def _create(self, path: Path, shape: tuple[int, int]) -> np.memmap:
        return np.lib.format.open_memmap(path, mode="w+", dtype=self.params.dtype, shape=shape)

    def _joined(self, entry: Path, split: str, blocks: int) -> np.ndarray:
        """Return the features of the last `features.blocks` blocks, concatenated: (N, D of all), also memory-mapped."""
        last = [entry / f"{split}-{block}.npy" for block in range(blocks)][-self.params.blocks :]
        if len(last) == 1:
            return _mapped(last[0])
        path = entry / f"{split}-last{len(last)}.npy"
        if not path.exists():
            arrays = [_mapped(file) for file in last]
            shape = (len(arrays[0]), sum(a.shape[1] for a in arrays))
            self._make_room(shape[0] * shape[1], entry)
            partial = path.with_suffix(".partial")
            joined = self._create(partial, shape)
            for start in range(0, shape[0], ROWS):
                joined[start : start + ROWS] = np.concatenate([a[start : start + ROWS] for a in arrays], axis=1)
            joined.flush()
            partial.replace(path)
        return _mapped(path)

    def _make_room(self, values: int, entry: Path) -> None:
        """Remove the least recently read other entries until `values` more values fit into the budget.

        An entry that another process is filling or opening stays.

        Raises:
            LgpError: the disk is still full.
        """
        wanted = values * np.dtype(self.params.dtype).itemsize
        # two processes must not remove entries at the same time
        with FileLock(self.folder / "room.lock"):
            self._evict(wanted, entry)
        # on a full disk, writing through a memory map raises nothing: the system kills the process
        check_disk_space(self.folder, wanted)

    def _evict(self, wanted: int, entry: Path) -> None:
        folders = sorted((p for p in self.folder.iterdir() if p.is_dir() and p.stem != entry.stem), key=_last_read)
        sizes = {other: sum(file.stat().st_size for file in other.glob("*.npy")) for other in folders}
        used = sum(sizes.values())
        for other in folders:
            killed = bool(other.suffix)  # left by a dead process that was filling or removing it
            if used + wanted <= self.cache_gib * GIB and not killed:
                continue
            try:
                with FileLock(self._lock_of(other), timeout=0):
                    # a half removed entry must not look like a whole one
                    removed = other if killed else other.replace(other.with_suffix(".partial"))
                    shutil.rmtree(removed)
            except Timeout:
                continue
            used -= sizes[other]


def _last_read(entry: Path) -> float:
    return entry.stat().st_mtime


def _mapped(path: Path) -> np.ndarray:
    # copy on write: torch needs writable arrays, and the file must not change
    array: np.ndarray = np.load(path, mmap_mode="c")
    return array


@dataclass(frozen=True)
class Standardizer:
    """The map to zero mean and unit deviation per feature: (features - mean) / std."""

    mean: np.ndarray
    std: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Map features (N, D) to float32."""
        return ((features - self.mean) / self.std).astype(np.float32)


def standardizer(reference: np.ndarray) -> Standardizer:
    """Measure mean and deviation per feature on `reference` (N, D).

    Features that are constant there are only centred. `reference` may be memory-mapped: it is read in blocks.
    """
    # in single precision the mean of a constant has a small error; the division would scale the error to 1
    blocks = [reference[start : start + ROWS] for start in range(0, len(reference), ROWS)]
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / len(reference)
    squares = sum(((block - mean) ** 2).sum(axis=0) for block in blocks)
    std = np.sqrt(squares / len(reference))
    std[std < 1e-6] = 1.0
    return Standardizer(np.asarray(mean), std)


def normalizer(_reference: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map of each image's features to zero mean and length 1, as the paper's released code does it."""

    def normalize(features: np.ndarray) -> np.ndarray:
        centred = features - features.mean(axis=1, keepdims=True, dtype=np.float64)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        return (centred / np.maximum(length, 1e-12)).astype(np.float32)

    return normalize
