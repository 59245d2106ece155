"""Prepared images on disk: few large files, read by memory map. They hold no label.

| file | content |
|---|---|
| `images.npy` | uint8 (N, H, W, C), if all images have the model's size |
| `images-*.arrow` | otherwise: the encoded bytes |
| `index.parquet` | a row per image; the row number is the image's id: path, part, height, width, content, hash |
| `meta.json` | size, channels, mean and standard deviation per channel, a digest of everything |
"""

import copy
import io
import json
import mmap
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from lgp.data.normalization import Normalization
from lgp.errors import LgpError
from lgp.params.section import Interpolation

if TYPE_CHECKING:
    import pandas as pd

INDEX, META, ARRAY = "index.parquet", "meta.json", "images.npy"
PARTS = ("train", "val", "test", "dropped")
MODES = {1: "L", 3: "RGB"}
GROUND = "white"  # under transparent pixels, as browsers and viewers show them


def shards_in(folder: Path) -> list[Path]:
    """Return the Arrow files of encoded images, in order."""
    return sorted(folder.glob("images-*.arrow"))


def decode(data: bytes, channels: int) -> Image.Image:
    """Decode one image to 8-bit grey (1 channel) or RGB (3 channels), upright by its EXIF.

    Transparent pixels are laid on `GROUND`. An image without transparency keeps its pixels.

    Raises:
        ValueError: pixels of 32 bits or floats. Their range is unknown.
    """
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # Pillow's own conversion would clip at 255
            upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
        if upright.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {upright.mode}, neither 8 nor 16 bits")
        if upright.has_transparency_data:
            ground = Image.new("RGBA", upright.size, GROUND)
            upright = Image.alpha_composite(ground, upright.convert("RGBA"))
        return upright.convert(MODES[channels])


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


class KeptImages:
    """Decoded images in memory, shared with forked worker processes. The first to need an image decodes it."""

    def __init__(self, ids: np.ndarray, sizes: np.ndarray, channels: int) -> None:
        """Reserve memory for the images `ids`. `sizes` (N, 2) are their heights and widths."""
        self._place = {int(image_id): i for i, image_id in enumerate(ids)}
        self._shapes = [(int(height), int(width), channels) for height, width in sizes]
        self._starts = np.cumsum([0, *(int(np.prod(shape)) for shape in self._shapes)])
        # anonymous shared memory: unlike a file in /dev/shm it has no limit of its own; it takes memory as it fills
        self._pixels = np.frombuffer(mmap.mmap(-1, max(int(self._starts[-1]), 1)), dtype=np.uint8)
        self._ready = np.frombuffer(mmap.mmap(-1, max(len(ids), 1)), dtype=np.uint8)

    def get(self, image_id: int, read: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return an image (H, W, C) uint8. Decode it by `read` if no process has done so."""
        i = self._place.get(image_id)
        if i is None:
            return read(image_id)
        kept = self._pixels[self._starts[i] : self._starts[i + 1]].reshape(self._shapes[i])
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
        """1 (grey) or 3 (RGB)."""
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

    @cached_property
    def paths(self) -> list[str]:
        """The identity of each image within its source, (N,)."""
        return list(self.index["path"])

    @cached_property
    def parts(self) -> np.ndarray:
        """The part of each image, (N,): train, val, test or dropped."""
        return self.index["part"].to_numpy()

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) height and width of each image as stored, in pixels."""
        return self.index[["height", "width"]].to_numpy(dtype=np.int64)

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
    def _shards(self) -> tuple[np.ndarray, list[Any]]:
        import pyarrow as pa

        paths = shards_in(self.folder)
        columns = [pa.ipc.open_file(pa.memory_map(str(p))).read_all()["image"] for p in paths]
        return np.cumsum([0, *(len(c) for c in columns)]), columns

    def open_image(self, image_id: int) -> Image.Image:
        """Return one image as stored."""
        if self._array is not None:
            return Image.fromarray(self._array[image_id].squeeze())
        starts, columns = self._shards
        shard = int(np.searchsorted(starts, image_id, side="right")) - 1
        return decode(columns[shard][int(image_id - starts[shard])].as_py(), self.channels)

    def pixels(self, image_id: int) -> np.ndarray:
        """Return one image decoded, (H, W, C) uint8."""
        if self._kept is not None:
            return self._kept.get(image_id, self._decoded)
        return self._decoded(image_id)

    def _decoded(self, image_id: int) -> np.ndarray:
        if self._array is not None:
            return np.array(self._array[image_id])
        return np.atleast_3d(np.array(self.open_image(image_id)))

    def keep_decoded(self, budget_bytes: float) -> None:
        """Keep each image of pre-training in memory once it is decoded, if all of them fit into a budget."""
        ids = self.pretraining_ids
        if self._array is None and int(self.sizes[ids].prod(axis=1).sum()) * self.channels <= budget_bytes:
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
            pixels = torch.from_numpy(self._array[ids]).permute(0, 3, 1, 2).float()
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
            return torch.from_numpy(self._array[ids]).permute(0, 3, 1, 2).contiguous()
        mode = tvf.InterpolationMode(interpolation)
        images = [tvf.resize(self.open_image(i), [shorter], mode, antialias=True) for i in ids.tolist()]
        return torch.stack([tvf.pil_to_tensor(tvf.center_crop(image, [size, size])) for image in images])

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
