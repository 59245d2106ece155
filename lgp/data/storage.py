"""Prepared images on disk: few large files, read by memory map. They hold no label.

| file | content |
|---|---|
| `images.npy` | uint8 (N, H, W, C), if all images have the model's size |
| `images-*.arrow` | otherwise: the encoded bytes |
| `index.parquet` | a row per image, sorted by content; the row number is the image's id |
| `meta.json` | size, channels, mean and standard deviation per channel, a digest of everything |

Columns of the index: path, part, height, width, content, hash, and row, the image's place in the array or in the
shards together. With `data.storage: reference` there are neither array nor shards, and the index has file, size and
mtime_ns of each image.

Worker processes that are forked share what is opened here: memory maps and arrays, with no object per image.
"""

import copy
import json
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from lgp.data.conversion import as_image, decode
from lgp.data.normalization import Normalization
from lgp.errors import LgpError
from lgp.params.section import Interpolation

if TYPE_CHECKING:
    import pandas as pd

INDEX, META, ARRAY = "index.parquet", "meta.json", "images.npy"
PARTS = ("train", "val", "test", "dropped")
SHARDS, BATCH_ROWS = "images-{:05d}.arrow", 64


def shards_in(folder: Path) -> list[Path]:
    """Return the Arrow files of encoded images, in order."""
    return sorted(folder.glob("images-*.arrow"))


def encoded_batch(images: Sequence[bytes]) -> Any:
    """Return encoded images as a record batch of a shard."""
    import pyarrow as pa

    return pa.record_batch([pa.array(images, pa.large_binary())], names=["image"])


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it bilinearly, in one batched call.

    If no box is larger than `size`, antialiasing does nothing, and the result equals `F.interpolate` of each box alone,
    in half the time. Sample positions are clamped to the box: no pixel outside it contributes.

    Args:
        images: (B, C, H, W) float.
        boxes: (B, 4) top, left, height, width in pixels.
        size: side of the result in pixels.

    Returns:
        (B, C, size, size) float.
    """
    height, width = images.shape[-2:]
    steps = (torch.arange(size, dtype=images.dtype) + 0.5) / size

    def positions(start: Tensor, length: Tensor, whole: int) -> Tensor:
        start, length = start[:, None].to(images.dtype), length[:, None].to(images.dtype)
        centres = (start + steps * length).clamp(min=start + 0.5, max=start + length - 0.5)
        return centres * (2 / whole) - 1

    y = positions(boxes[:, 0], boxes[:, 2], height)
    x = positions(boxes[:, 1], boxes[:, 3], width)
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


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


def _as_tensor(image: np.ndarray | Image.Image | Tensor) -> Tensor:
    """Return an image, (H, W, C) if it is an array, as (C, H, W) uint8."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image).permute(2, 0, 1)
    return tvf.pil_to_tensor(image) if isinstance(image, Image.Image) else image


class KeptImages:
    """Decoded images in memory, shared with forked worker processes. The first to need an image decodes it."""

    def __init__(self, ids: np.ndarray, sizes: np.ndarray, channels: int) -> None:
        """Reserve memory for the images `ids`, which ascend. `sizes` (N, 2) are their heights and widths."""
        self._ids, self._sizes, self._channels = ids, sizes, channels
        self._starts = np.concatenate([[0], np.cumsum(sizes.prod(axis=1) * channels)])
        # anonymous shared memory: unlike a file in /dev/shm it has no limit of its own; it takes memory as it fills
        self._pixels = np.frombuffer(mmap.mmap(-1, max(int(self._starts[-1]), 1)), dtype=np.uint8)
        self._ready = np.frombuffer(mmap.mmap(-1, max(len(ids), 1)), dtype=np.uint8)

    def get(self, image_id: int, read: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return an image (H, W, C) uint8. Decode it by `read` if no process has done so."""
        i = int(np.searchsorted(self._ids, image_id))
        if i == len(self._ids) or self._ids[i] != image_id:
            return read(image_id)
        kept = self._pixels[self._starts[i] : self._starts[i + 1]].reshape(*self._sizes[i], self._channels)
        if not self._ready[i]:
            # two workers may do so at once: they write the same bytes
            kept[...] = read(image_id)
            self._ready[i] = 1
        return kept


class Images:
    """Prepared images, opened for reading."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`. Raise `LgpError` if it has no prepared images."""
        self.folder = folder
        self._kept: KeptImages | None = None
        try:
            self.meta: dict[str, Any] = json.loads((folder / META).read_text())
        except OSError:
            raise LgpError(f"no prepared images in {folder}: run `lgp prepare` first") from None

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

        return pd.read_parquet(self.folder / INDEX)

    def _column(self, name: str) -> Any:
        import pyarrow.parquet as pq

        return pq.read_table(self.folder / INDEX, columns=[name])[name]

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
        return np.load(path, mmap_mode="r") if path.exists() else None

    @cached_property
    def _rows(self) -> np.ndarray:
        """(N,) the place of each image in the store."""
        return self._column("row").to_numpy()

    @cached_property
    def _shards(self) -> tuple[np.ndarray, list[Any]]:
        import pyarrow as pa

        paths = shards_in(self.folder)
        _allow_open_files(len(paths))
        columns = [pa.ipc.open_file(pa.memory_map(str(p))).read_all()["image"] for p in paths]
        return np.cumsum([0, *(len(c) for c in columns)]), columns

    @cached_property
    def _files(self) -> tuple[Any, np.ndarray] | None:
        """By reference: the file of each image, and (N, 2) its size in bytes and time."""
        import pyarrow.parquet as pq

        if "file" not in pq.read_schema(self.folder / INDEX).names:
            return None
        states = np.stack([self._column(name).to_numpy() for name in ("size", "mtime_ns")], axis=1)
        return self._column("file").combine_chunks(), states

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
        return as_image(self._decoded(image_id))

    def pixels(self, image_id: int) -> np.ndarray:
        """Return one image decoded, (H, W, C) uint8."""
        if self._kept is not None:
            return self._kept.get(image_id, self._decoded)
        return self._decoded(image_id)

    def _decoded(self, image_id: int) -> np.ndarray:
        if self._array is not None:
            return np.array(self._array[self._rows[image_id]])
        return decode(self._encoded(image_id), self.channels)

    def keep_decoded(self, budget_bytes: float) -> None:
        """Keep each image of pre-training in memory once it is decoded, if all of them fit into a budget.

        It opens all files. Processes that are forked afterwards share them.
        """
        ids = self.pretraining_ids
        if self._array is not None:
            return
        _ = self._files or (self._rows, self._shards)
        if int(self.sizes[ids].prod(axis=1).sum()) * self.channels <= budget_bytes:
            self._kept = KeptImages(ids, self.sizes[ids], self.channels)

    def crops(self, ids: np.ndarray, boxes: Tensor, interpolation: Interpolation = "bilinear") -> Tensor:
        """Cut V boxes out of each image and resize them to the model's size. Each image is decoded once.

        Resizing is antialiased, as in torchvision for a tensor of bytes.

        Args:
            ids: (B,) image ids.
            boxes: (B, V, 4) top, left, height, width in pixels of the stored image.
            interpolation: of the resizing.

        Returns:
            (B, V, C, S, S) uint8.
        """
        size, views = self.image_size, boxes.shape[1]
        if self._array is not None and interpolation == "bilinear":
            pixels = torch.from_numpy(self._array[self._rows[ids]]).permute(0, 3, 1, 2).float()
            cut = crop_and_resize(pixels.repeat_interleave(views, dim=0), boxes.flatten(0, 1), size)
            return cut.round().to(torch.uint8).unflatten(0, (-1, views))
        crops = []
        for image_id, image_boxes in zip(ids.tolist(), boxes.tolist(), strict=True):
            image = torch.from_numpy(self.pixels(image_id)).permute(2, 0, 1)[None]
            for top, left, height, width in image_boxes:
                cut = image[:, :, top : top + height, left : left + width]
                crops.append(F.interpolate(cut, (size, size), mode=interpolation, antialias=True))
        return torch.cat(crops).unflatten(0, (-1, views))

    def whole(self, ids: np.ndarray, interpolation: Interpolation = "bilinear") -> Tensor:
        """Return the images for evaluation, without augmentation.

        The shorter side is resized to S / eval_crop, then the centre S × S is cropped, as torchvision evaluates. The
        recipe is the same for images that are stored as one array and for encoded images.

        Args:
            ids: (B,) image ids.
            interpolation: of the resizing.

        Returns:
            (B, C, S, S) uint8.
        """
        size = self.image_size
        shorter = round(size / self.meta["eval_crop"])
        if self._array is not None and shorter == size:
            return torch.from_numpy(self._array[self._rows[ids]]).permute(0, 3, 1, 2).contiguous()
        mode = tvf.InterpolationMode(interpolation)
        # Pillow knows no more than colours, and weighs them by alpha
        form = as_image if self.channels in (1, 3) else _as_tensor
        images = [tvf.resize(form(self._decoded(i)), [shorter], mode, antialias=True) for i in ids.tolist()]
        return torch.stack([_as_tensor(tvf.center_crop(image, [size, size])) for image in images])

    def normalize(self, images: Tensor) -> Tensor:
        """Turn images (…, C, H, W), uint8 or floats in [0, 1], into the encoder's input."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """Invert `normalize`: the encoder's input (B, C, H, W) → floats in about [0, 1]."""
        return images * torch.tensor(self.std).view(-1, 1, 1) + torch.tensor(self.mean).view(-1, 1, 1)
