"""Prepared images as tensors: crops for training, squares for evaluation, normalised input of the encoder."""

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lgp.data.stored import StoredImages
from lgp.params.section import Interpolation


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


def _crops_of_array(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut boxes (B, V, 4) out of images (B, C, H, W) uint8, resized bilinearly: (B, V, C, size, size) uint8."""
    views, flat = boxes.shape[1], boxes.flatten(0, 1)
    cut = crop_and_resize(images.float().repeat_interleave(views, dim=0), flat, size).round().to(torch.uint8)
    for place in (flat[:, 2:] > size).any(dim=1).nonzero()[:, 0].tolist():  # these are antialiased
        cut[place] = _resized(images[place // views][None], flat[place].tolist(), size, "bilinear")[0]
    return cut.unflatten(0, (-1, views))


def _resized(image: Tensor, box: Sequence[int], size: int, interpolation: Interpolation) -> Tensor:
    """Cut one box out of an image (1, C, H, W) uint8, and resize it, antialiased: (1, C, size, size)."""
    top, left, height, width = box
    cut = image[:, :, top : top + height, left : left + width]
    return F.interpolate(cut, (size, size), mode=interpolation, antialias=True)


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


class Images(StoredImages):
    """Prepared images, opened for reading, as tensors."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`. Raise `LgpError` if it has no prepared images."""
        super().__init__(folder)
        self._kept: KeptImages | None = None

    def pixels(self, image_id: int) -> np.ndarray:
        """Return one image decoded, (H, W, C) uint8, from memory if it is kept there."""
        return self._kept.get(image_id, super().pixels) if self._kept is not None else super().pixels(image_id)

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

        Args:
            ids: (B,) image ids.
            boxes: (B, V, 4) top, left, height, width in pixels of the stored image.
            interpolation: of the resizing.

        Returns:
            (B, V, C, S, S) uint8.
        """
        return self.crops_of_sizes(ids, [(boxes, self.image_size)], interpolation)[0]

    def crops_of_sizes(
        self, ids: np.ndarray, wanted: Sequence[tuple[Tensor, int]], interpolation: Interpolation = "bilinear"
    ) -> list[Tensor]:
        """Cut boxes out of each image for several sizes. Each image is decoded once.

        Resizing is antialiased, as in torchvision for a tensor of bytes.

        Args:
            ids: (B,) image ids.
            wanted: for each size S in pixels, boxes (B, V, 4): top, left, height, width in pixels of the stored image.
            interpolation: of the resizing.

        Returns:
            For each size, (B, V, C, S, S) uint8.
        """
        if self._array is not None and interpolation == "bilinear":
            pixels = torch.from_numpy(self._array[self._rows[ids]]).permute(0, 3, 1, 2)
            return [_crops_of_array(pixels, boxes, size) for boxes, size in wanted]
        crops: list[list[Tensor]] = [[] for _ in wanted]
        for place, image_id in enumerate(ids.tolist()):
            image = torch.from_numpy(self.pixels(image_id)).permute(2, 0, 1)[None]
            for (boxes, size), of_size in zip(wanted, crops, strict=True):
                of_size += [_resized(image, box, size, interpolation) for box in boxes[place].tolist()]
        return [
            torch.cat(of_size).unflatten(0, (-1, boxes.shape[1]))
            for (boxes, _), of_size in zip(wanted, crops, strict=True)
        ]

    def whole(self, ids: np.ndarray, interpolation: Interpolation = "bilinear") -> Tensor:
        """Return the squares of images for evaluation, without augmentation, (B, C, S, S) uint8."""
        return torch.from_numpy(self.squares(ids, interpolation)).permute(0, 3, 1, 2).contiguous()

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
