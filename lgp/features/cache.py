"""Cached features: a file per encoder and block, in a folder named by a digest of what decides the content.

A file has the features of all images of training (labelled or not), val and test. Labels decide nothing of it. They
only choose rows: labels that arrive later extract nothing.

Every task on frozen features reads these files by memory map. Features of ImageNet (1.28 million × 768, 2 GB in half
precision) need no more memory than a batch.

An entry has the digests of its files. One that is damaged is extracted anew, with a warning.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout

from lgp.compute.intact import Damaged
from lgp.compute.seals import SEAL, check_sealed, seal
from lgp.data.labels import LabelledImages
from lgp.errors import check_disk_space
from lgp.features.extraction import ALONE, Encode, Running, extracted, pixels
from lgp.params.evaluate import FeatureParams

PARTS = ("train", "val", "test")  # of the index; the rows of a file are in this order
SPLITS = ("train", "unlabeled", "val", "test")  # of the labels
FORMAT = 3  # version of the files and of their computation: raise it when either changes
COMPUTED_WITH = ("torch", "timm")  # their versions change the last digits
ROWS = 2**16  # read at once
GIB = 2**30

T = TypeVar("T")


@dataclass(frozen=True)
class FeatureSource:
    """A source of features: the function from images to features, and its digest.

    Attributes:
        digest: of everything that decides the features of an image: weights, configuration, how they are pooled.
        blocks: number of features per image, one after each of the last blocks; 1 for raw pixels.
        encode: returns the function of normalised images (B, C, S, S) → (B, blocks, D). It is called if features are
            missing.
        running: how they are computed then.
    """

    digest: str
    blocks: int
    encode: Callable[[], Encode]
    running: Running = ALONE


def pixel_source(workers: int = 0) -> FeatureSource:
    """Return the source of raw pixels, as features of one block. Worker processes read them."""
    return FeatureSource("pixels", 1, lambda: lambda images: pixels(images)[:, None], Running(workers))


class BySplit(Mapping[str, T]):
    """A value per split, made when it is first asked for."""

    def __init__(self, make: Callable[[str], T]) -> None:
        """Make the value of a split by `make`."""
        self._make, self._made = make, dict[str, T]()

    def __getitem__(self, split: str) -> T:
        """Return the value of a split. Raise `KeyError` for an unknown one."""
        if split not in SPLITS:
            raise KeyError(split)
        if split not in self._made:
            self._made[split] = self._make(split)
        return self._made[split]

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)


@dataclass(frozen=True)
class Features:
    """Raw features of train, unlabeled, val and test, memory-mapped, with labels and ids.

    `x` has an array (N, D) per split, D over all chosen blocks. `by_block` has such an array after each block alone.
    `params` says how they were made.
    Where the images of a split follow each other in the cache, as all training images do if each has a label, its
    array is a part of the cached file. Other arrays are copied when they are first asked for. Labels `y` of unlabelled
    images are -1.
    """

    x: Mapping[str, np.ndarray]
    y: Mapping[str, np.ndarray]
    ids: Mapping[str, np.ndarray]
    classes: int
    by_block: Mapping[str, list[np.ndarray]]
    params: FeatureParams


class FeatureCache:
    """A folder of entries, one per source and prepared data. Above a given size, the least recently read go first."""

    def __init__(self, folder: Path, params: FeatureParams, cache_gib: float) -> None:
        """Keep up to `cache_gib` GiB of features in `folder`, besides those in use. `params` sets their form."""
        self.folder, self.params, self.cache_gib = folder, params, cache_gib

    def entry_of(self, source: FeatureSource, data: LabelledImages) -> Path:
        """Return the folder of the features of a source."""
        images = [data.meta["digest"], data.mean, data.std]
        decided_by = [FORMAT, source.digest, *images, self.params.dtype, *map(version, COMPUTED_WITH)]
        return self.folder / sha256(json.dumps(decided_by).encode()).hexdigest()[:32]

    def features(self, source: FeatureSource, data: LabelledImages) -> Features:
        """Return the features of a source for all splits. Missing features are extracted."""
        of_parts = [np.flatnonzero(data.parts == part) for part in PARTS]
        entry = self.entry_of(source, data)
        self.folder.mkdir(parents=True, exist_ok=True)
        # the first of several evaluations of one encoder extracts; the others wait and read
        with FileLock(self._lock_of(entry)):
            if entry.exists():
                _remove_if_damaged(entry)
            if not entry.exists():
                self._extract(source, data, of_parts, entry)
            blocks = [_mapped(file) for file in _files(entry, source.blocks)]
            joined = self._joined(entry, blocks)
            entry.touch()
        row_of = np.zeros(len(data.parts), dtype=np.int64)
        row_of[np.concatenate(of_parts)] = np.arange(len(joined))
        ids = {split: data.ids(split) for split in SPLITS}
        return Features(
            BySplit(lambda split: self._rows(joined, row_of[ids[split]])),
            {split: data.labels[of_split] for split, of_split in ids.items()},
            ids,
            len(data.classes),
            BySplit(lambda split: [self._rows(block, row_of[ids[split]]) for block in blocks]),
            self.params,
        )

    def _lock_of(self, entry: Path) -> Path:
        return entry.with_suffix(".lock")

    def _extract(
        self, source: FeatureSource, data: LabelledImages, of_parts: Sequence[np.ndarray], entry: Path
    ) -> None:
        partial = entry.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir()
        encode = source.encode()
        images = sum(map(len, of_parts))
        arrays: Sequence[np.memmap] = []
        first = 0
        for of_part in of_parts:
            for batch in extracted(encode, data, of_part, running=source.running):
                if not arrays:
                    shape = (images, batch.shape[2])
                    self._make_room(source.blocks * images * shape[1], entry)
                    arrays = [self._create(file, shape) for file in _files(partial, source.blocks)]
                for block, array in enumerate(arrays):
                    array[first : first + len(batch)] = batch[:, block]
                first += len(batch)
        for array in arrays:
            array.flush()
        seal(partial)
        partial.replace(entry)

    def _create(self, path: Path, shape: tuple[int, int]) -> np.memmap:
        return np.lib.format.open_memmap(path, mode="w+", dtype=self.params.dtype, shape=shape)

    def _joined(self, entry: Path, blocks: Sequence[np.ndarray]) -> np.ndarray:
        """Return the features of the last `features.blocks` blocks, concatenated: (N, D of all), also memory-mapped."""
        last = blocks[-self.params.blocks :]
        if len(last) == 1:
            return last[0]
        path = entry / f"last{len(last)}.npy"
        if not path.exists():
            shape = (len(last[0]), sum(block.shape[1] for block in last))
            self._make_room(shape[0] * shape[1], entry)
            partial = path.with_suffix(".partial")
            joined = self._create(partial, shape)
            for start in range(0, shape[0], ROWS):
                joined[start : start + ROWS] = np.concatenate([b[start : start + ROWS] for b in last], axis=1)
            joined.flush()
            partial.replace(path)
            seal(entry, [path.name])
        return _mapped(path)

    def _rows(self, array: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return rows of an array: a view where they follow each other, else a copy.

        The copy is memory-mapped too. It lies in a file without a name, which goes with the process.
        """
        first = int(rows[0]) if len(rows) else 0
        if np.array_equal(rows, np.arange(first, first + len(rows))):
            return array[first : first + len(rows)]
        check_disk_space(self.folder, len(rows) * array[0].nbytes)
        with TemporaryFile(dir=self.folder) as file:
            copy = np.memmap(file, array.dtype, "w+", shape=(len(rows), array.shape[1]))
        for start in range(0, len(rows), ROWS):
            copy[start : start + ROWS] = array[rows[start : start + ROWS]]
        return copy

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


def _remove_if_damaged(entry: Path) -> None:
    """Remove an entry whose files are not those that were written, and say so."""
    try:
        if not (entry / SEAL).exists():
            raise Damaged(entry / SEAL, "it is missing", "")
        check_sealed(entry, "")
    except Damaged as e:
        print(f"warning: {e.file} of the cached features is damaged ({e.fault}): they are extracted anew", flush=True)
        shutil.rmtree(entry)


def _last_read(entry: Path) -> float:
    return entry.stat().st_mtime


def _files(entry: Path, blocks: int) -> list[Path]:
    """Return the file of each block."""
    return [entry / f"{block}.npy" for block in range(blocks)]


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


def standardizer(*references: np.ndarray) -> Standardizer:
    """Measure mean and deviation per feature on all `references`, each (N, D), together.

    Features that are constant there are only centred. An array may be memory-mapped: it is read in blocks.
    """
    # in single precision the mean of a constant has a small error; the division would scale the error to 1
    blocks = [of[start : start + ROWS] for of in references for start in range(0, len(of), ROWS)]
    images = sum(map(len, references))
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / images
    squares = sum(((block - mean) ** 2).sum(axis=0) for block in blocks)
    std = np.sqrt(squares / images)
    std[std < 1e-6] = 1.0
    return Standardizer(np.asarray(mean), std)


def normalizer(*_references: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map of each image's features to zero mean and length 1, as the paper's released code does it."""

    def normalize(features: np.ndarray) -> np.ndarray:
        centred = features - features.mean(axis=1, keepdims=True, dtype=np.float64)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        return (centred / np.maximum(length, 1e-12)).astype(np.float32)

    return normalize
