"""Prepared images on disk: few large files, read by memory map. They hold no label.

| file | content |
|---|---|
| `images.npy` | uint8 (N, H, W, C), if all images have the model's size |
| `images-*.arrow` | otherwise: the encoded bytes |
| `index.parquet` | a row per image, sorted by content; the row number is the image's id |
| `meta.json` | size, channels, mean and standard deviation per channel, a digest of everything |
| `digests.json` | digests of these files, which are compared when the folder is opened |

Columns of the index: path, part, height, width, content, hash, and row, the image's place in the array or in the
shards together. With `data.storage: reference` there are neither array nor shards, and the index has file, size and
mtime_ns of each image.

Worker processes that are forked share what is opened here: memory maps and arrays, with no object per image. This
module imports no torch, which `lgp prepare` does without.
"""

import copy
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image
from pydantic import BaseModel

from lgp.compute.intact import read_json, read_parquet, reading
from lgp.compute.seals import check_sealed
from lgp.data.conversion import as_image, decode
from lgp.data.normalization import Normalization
from lgp.errors import LgpError
from lgp.params.section import Interpolation

if TYPE_CHECKING:
    import pandas as pd

RESAMPLING: dict[str, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
INDEX, META, ARRAY = "index.parquet", "meta.json", "images.npy"
PARTS = ("train", "val", "test", "dropped")
SHARDS, BATCH_ROWS = "images-{:05d}.arrow", 64
REMEDY = "run `lgp prepare`"
LONGEST_STRIP = 16  # times its width: longer ones are cut before they are resized


class ImagesMeta(BaseModel):
    """What `meta.json` has at least. The digest, and statistics that are not given, are written last."""

    image_size: int
    channels: int
    eval_crop: float
    mean: list[float] | None
    std: list[float] | None
    digest: str = ""


def shards_in(folder: Path) -> list[Path]:
    """Return the Arrow files of encoded images, in order."""
    return sorted(folder.glob("images-*.arrow"))


def encoded_batch(images: Sequence[bytes]) -> Any:
    """Return encoded images as a record batch of a shard."""
    import pyarrow as pa

    return pa.record_batch([pa.array(images, pa.large_binary())], names=["image"])


def _allow_open_files(count: int) -> None:
    """Raise the limit of open files, where the system lets us: each shard stays open. Often it is 1,024."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + 1024
    if soft != resource.RLIM_INFINITY and soft < needed:
        allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def _unchanged(file: Path, size: int, mtime_ns: int) -> bytes:
    """Read a file that is kept by reference. Raise `LgpError` if it is not as it was."""
    remedy = "(data.storage is reference): restore it, or run `lgp prepare` again"
    try:
        state = file.stat()
        if (state.st_size, state.st_mtime_ns) == (size, mtime_ns):
            return file.read_bytes()
    except OSError as error:
        raise LgpError(f"{file} of the prepared images cannot be read, {error.strerror} {remedy}") from None
    raise LgpError(f"{file} has changed since its image was prepared {remedy}")


class StoredImages:
    """Prepared images, opened for reading, as pixels."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`. Raise `LgpError` if it has no prepared images, or if a file of it is damaged."""
        self.folder = folder
        if not (folder / META).exists():
            raise LgpError(f"no prepared images in {folder}: run `lgp prepare` first")
        check_sealed(folder, REMEDY)
        self.meta: dict[str, Any] = read_json(folder / META, ImagesMeta, REMEDY)

    @property
    def channels(self) -> int:
        """C of an image. 1 is grey, 2 grey and alpha, 3 RGB."""
        return int(self.meta["channels"])

    @property
    def image_size(self) -> int:
        """Side of the encoder's input images, in pixels."""
        return int(self.meta["image_size"])

    @property
    def mean(self) -> list[float]:
        """Mean per channel, of pixels in [0, 1]."""
        return list(self.meta["mean"])

    @property
    def std(self) -> list[float]:
        """Standard deviation per channel, of pixels in [0, 1]."""
        return list(self.meta["std"])

    @property
    def normalization(self) -> Normalization:
        """The statistics of `normalize`."""
        return Normalization.of(self.meta)

    def normalized_by(self, normalization: Normalization) -> Self:
        """Return the same images, which other statistics normalise."""
        images = copy.copy(self)
        images.meta = self.meta | {"mean": list(normalization.mean), "std": list(normalization.std)}
        return images

    @cached_property
    def index(self) -> "pd.DataFrame":
        """The index: a row per image."""
        import pandas as pd
        import pyarrow as pa

        with reading(self.folder / INDEX, REMEDY, pa.ArrowException):
            return pd.read_parquet(self.folder / INDEX)

    def _column(self, name: str) -> Any:
        return read_parquet(self.folder / INDEX, [name], REMEDY)[name]

    @cached_property
    def paths(self) -> list[str]:
        """The identity of each image within its source, (N,)."""
        return self._column("path").to_pylist()

    @cached_property
    def parts(self) -> np.ndarray:
        """The part of each image, (N,): train, val, test or dropped."""
        parts = self._column("part").combine_chunks().dictionary_encode()
        return np.array(parts.dictionary.to_pylist(), dtype=str)[parts.indices.to_numpy()]

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) height and width of each image as stored, in pixels."""
        return np.stack([self._column(name).to_numpy() for name in ("height", "width")], axis=1).astype(np.int64)

    def ids(self, part: str) -> np.ndarray:
        """Return the sorted ids of `train`, `val` or `test`."""
        return np.flatnonzero(self.parts == part)

    @cached_property
    def pretraining_ids(self) -> np.ndarray:
        """The ids of the images of pre-training, labelled or not. None is of val or test."""
        return np.flatnonzero(self.parts == "train")

    @cached_property
    def _array(self) -> np.ndarray | None:
        path = self.folder / ARRAY
        if not path.exists():
            return None
        with reading(path, REMEDY):
            array: np.ndarray = np.load(path, mmap_mode="r")
            return array

    @cached_property
    def _rows(self) -> np.ndarray:
        """(N,) the place of each image in the store."""
        return self._column("row").to_numpy()

    @cached_property
    def _shards(self) -> tuple[np.ndarray, list[Any]]:
        import pyarrow as pa

        paths = shards_in(self.folder)
        _allow_open_files(len(paths))
        columns = []
        for path in paths:
            with reading(path, REMEDY, pa.ArrowException):
                columns.append(pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"])
        return np.cumsum([0, *(len(c) for c in columns)]), columns

    @cached_property
    def _files(self) -> tuple[Any, np.ndarray] | None:
        """By reference: the file of each image, and (N, 2) its size in bytes and time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with reading(self.folder / INDEX, REMEDY, pa.ArrowException):
            names = pq.read_schema(self.folder / INDEX).names
        if "file" not in names:
            return None
        states = np.stack([self._column(name).to_numpy() for name in ("size", "mtime_ns")], axis=1)
        return self._column("file").combine_chunks(), states

    def open_all(self) -> None:
        """Open what reading pixels needs. Processes that are forked later share it, and open nothing themselves."""
        opened: list[object] = [self.sizes, self._files]
        if self._files is None:
            opened += [self._rows, self._array if self._array is not None else self._shards]

    def _encoded(self, image_id: int) -> bytes:
        """Return one image as its file or shard holds it."""
        if self._files is not None:
            files, states = self._files
            return _unchanged(Path(os.fsdecode(files[image_id].as_py())), *states[image_id].tolist())
        starts, columns = self._shards
        row = int(self._rows[image_id])
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        return columns[shard][row - int(starts[shard])].as_py()

    def open_image(self, image_id: int) -> Image.Image:
        """Return one image as stored. Raise `LgpError` if it has more than 4 channels."""
        if self.channels > 4:
            raise LgpError(f"images of {self.channels} channels (data.channels) cannot be shown: at most 4 can")
        return as_image(self.pixels(image_id))

    def pixels(self, image_id: int) -> np.ndarray:
        """Return one image decoded, (H, W, C) uint8."""
        if self._array is not None:
            return np.array(self._array[self._rows[image_id]])
        return decode(self._encoded(image_id), self.channels)

    def squares(self, ids: np.ndarray, interpolation: Interpolation = "bilinear") -> np.ndarray:
        """Return the images for evaluation, without augmentation, (B, S, S, C) uint8.

        The shorter side is resized to S / eval_crop, then the centre S × S is cropped, as torchvision evaluates. The
        recipe is the same for images that are stored as one array and for encoded images.

        Args:
            ids: (B,) image ids.
            interpolation: of the resizing, which is antialiased.
        """
        size = self.image_size
        shorter = int(size / self.meta["eval_crop"])  # as timm and MAE round it
        if self._array is not None and shorter == size:
            return self._array[self._rows[ids]]
        return np.stack([square(self.pixels(i), shorter, size, RESAMPLING[interpolation]) for i in ids.tolist()])


def square(pixels: np.ndarray, shorter: int, size: int, resampling: Image.Resampling) -> np.ndarray:
    """Resize pixels (H, W, C) to a shorter side, and cut the square in the middle. Roundings are torchvision's.

    Of a strip, the middle is cut first: of 1 × 8,000 pixels, the whole resized strip would take gigabytes.
    """
    pixels = _middle(pixels)
    height, width, channels = pixels.shape
    longer = int(shorter * max(height, width) / min(height, width))
    across, down = (shorter, longer) if width <= height else (longer, shorter)
    # Pillow knows no more than colours, and weighs them by alpha
    bands = [pixels] if channels in (1, 3) else np.split(pixels, channels, axis=2)
    resized = [np.atleast_3d(np.asarray(as_image(band).resize((across, down), resampling))) for band in bands]
    top, left = round((down - size) / 2), round((across - size) / 2)
    return np.concatenate(resized, axis=2)[top : top + size, left : left + size]


def _middle(pixels: np.ndarray) -> np.ndarray:
    """Cut a strip (H, W, C) to its middle, `LONGEST_STRIP` times as long as wide; one pixel more if the rest is odd.

    Other pixels are returned whole.
    """
    height, width = pixels.shape[:2]
    length = max(height, width) - LONGEST_STRIP * min(height, width)
    cut = max(length // 2, 0)
    return pixels[cut : height - cut] if height > width else pixels[:, cut : width - cut]
