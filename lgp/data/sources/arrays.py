"""Arrays of pixels: `.npz` files, the data sets of torchvision, and scikit-learn's digits."""

import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lgp.data.sources.cells import class_name, split_of_cell
from lgp.data.sources.image_cells import state_of
from lgp.data.sources.listing import Listing, fail
from lgp.data.sources.offers import SPLITS, Columns, Offers, Read, Skipped, read_file
from lgp.data.sources.specs import DIGITS
from lgp.errors import LgpError, one_line

CHANNELS = (1, 3, 4)
ROLES = {
    **dict.fromkeys(("images", "image", "imgs", "img", "x", "data"), "image"),
    **dict.fromkeys(("labels", "label", "y", "targets", "target"), "label"),
    **dict.fromkeys(("splits", "split"), "split"),
    **dict.fromkeys(("groups", "group"), "group"),
}
DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, NotImplementedError)

TORCHVISION: dict[str, dict[str, bool | str | None]] = {
    **{
        name: {"train": True, "test": False}
        for name in ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "USPS")
    },
    **{name: {"train": "train", "test": "test"} for name in ("SVHN", "Food101", "GTSRB")},
    **{
        name: {"train": "train", "val": "val", "test": "test"}
        for name in ("Flowers102", "DTD", "FGVCAircraft", "RenderedSST2")
    },
    "Country211": {"train": "train", "val": "valid", "test": "test"},
    "Imagenette": {"train": "train", "val": "val"},
    "OxfordIIITPet": {"train": "trainval", "test": "test"},
    "STL10": {"train": "train", "unlabeled": "unlabeled", "test": "test"},
    **{name: {"train": None} for name in ("EuroSAT", "SUN397")},
}
"""Data sets of torchvision with one label an image: word of the split → value of the argument `train` or `split`."""


class _Part(NamedTuple):
    """Arrays of an `.npz` file that belong together: the word of their split, and a name by role."""

    word: str | None
    names: dict[str, str]


class _Array(NamedTuple):
    """An array in an `.npz` file, as its header describes it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def npz_source(path: Path, columns: Columns) -> Offers:
    """List arrays of images in an `.npz` file, which are read image by image.

    Images are `images` (N, H, W), (N, H, W, C) or (N, C, H, W): whole numbers from 0 to 255, uint16, or floats from 0
    to 1. Labels are `labels` (N,) or (N, 1). `groups` and `splits` (N,) may be there. The names may have a word for the
    split, as in `train_images` and `train_labels` (MedMNIST) or `x_train` and `y_train` (Keras).

    Raises:
        LgpError: the file cannot be read, has no images or another number of labels, or holds Python objects.
    """
    listing = Listing()
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            parts = _parts(names, columns)
            arrays = [_checked(path, archive, part) for part in parts]
            for part, array in zip(parts, arrays, strict=True):
                _list_part(path, archive, part, array, listing)
    except DAMAGED as e:
        raise LgpError(f"{path} cannot be read as an .npz file: {one_line(e)}; save it again by np.savez") from None
    if not parts:
        raise LgpError(
            f"{path} has no images: its arrays are {', '.join(names) or 'none'}; name them images and labels, or "
            "x_train and y_train, or name the array of images"
        )
    used = {name for part in parts for name in part.names.values()}
    listing.skipped.extend(
        Skipped(name, "no array of images, and says nothing of one") for name in names if name not in used
    )
    return listing.offers(partial(_npz_reads, path, [part.names["image"] for part in parts], arrays))


def _parts(names: list[str], columns: Columns) -> list[_Part]:
    """Put the names of arrays together, by the word for the split in them."""
    parts: dict[str | None, dict[str, str]] = {}
    for given, array in columns._asdict().items():
        if array in names:
            parts.setdefault(None, {})[given] = array
    for name in names:
        words = re.split(r"[\W_]+", name.lower())
        role = next((ROLES[word] for word in words if word in ROLES), None)
        split = next((word for word in words if word in SPLITS), None)
        if role and len(words) == 1 + (split is not None) and name not in parts.get(None, {}).values():
            parts.setdefault(split, {}).setdefault(role, name)
    return [_Part(word, of_part) for word, of_part in parts.items() if "image" in of_part]


def _checked(path: Path, archive: zipfile.ZipFile, part: _Part) -> _Array:
    """Return what the header of a part's images says.

    Raises:
        LgpError: these are no images.
    """
    name = part.names["image"]
    with archive.open(f"{name}.npy") as file:
        array = _header(file, archive.getinfo(f"{name}.npy").file_size)
    valid = len(array.shape) == 3 or (len(array.shape) == 4 and {array.shape[1], array.shape[3]} & set(CHANNELS))
    if not valid or array.dtype.kind not in "buif":
        raise LgpError(
            f"{path}: {name} has the shape {array.shape} and the type {array.dtype}, but images are (N, H, W), "
            f"(N, H, W, C) or (N, C, H, W) with {', '.join(map(str, CHANNELS))} channels, of numbers"
        )
    return array


def _header(file: IO[bytes], size: int) -> _Array:
    """Read the header of an array. `file` is at the array's data then."""
    version = np.lib.format.read_magic(file)
    read: Callable[..., Any] = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which could run any code: save numbers and text")
    if fortran_order and len(shape) > 1:
        raise ValueError("an array has its first axis last in memory: save np.ascontiguousarray of it")
    if size - file.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array is not as long as its header says")
    return _Array(shape, dtype)


def _column(path: Path, archive: zipfile.ZipFile, name: str, count: int) -> list[Any]:
    """Read an array that has a value per image."""
    with archive.open(f"{name}.npy") as file:
        array = _header(file, archive.getinfo(f"{name}.npy").file_size)
        data = file.read()
    if array.shape not in ((count,), (count, 1)):
        several = "; several labels an image are not supported" if array.shape[:1] == (count,) else ""
        raise LgpError(f"{path}: {name} has the shape {array.shape} for {count:,} images: give ({count},){several}")
    return np.ndarray((count,), array.dtype, data).tolist()


def _list_part(path: Path, archive: zipfile.ZipFile, part: _Part, array: _Array, listing: Listing) -> None:
    count, state, images = array.shape[0], state_of(path), part.names["image"]
    columns = {role: _column(path, archive, name, count) for role, name in part.names.items() if role != "image"}
    empty = [None] * count
    rows = zip(*(columns.get(role, empty) for role in ("label", "split", "group")), strict=True)
    for row, (label, split, group) in enumerate(rows):
        where = f"{path}: row {row} of {images}"
        listing.add(
            f"{images}#{row}",
            split_of_cell(split, where) or part.word,
            class_name(label, where),
            group,
            f"{state}-{row}",
        )


def _npz_reads(path: Path, names: list[str], arrays: list[_Array], positions: Sequence[int]) -> Iterator[Read]:
    """Stream the images at ascending positions, array by array."""
    chosen, start = np.asarray(positions, dtype=np.int64), 0
    for name, array in zip(names, arrays, strict=True):
        wanted = chosen[(chosen >= start) & (chosen < start + array.shape[0])] - start
        done = 0
        try:
            for image in _rows(path, name, wanted.tolist()):
                yield partial(pixels_of, image)
                done += 1
        except DAMAGED as e:
            yield from [partial(fail, f"{name} is damaged: {one_line(e)}")] * (len(wanted) - done)
        start += array.shape[0]


def _rows(path: Path, name: str, wanted: list[int]) -> Iterator[np.ndarray]:
    """Read these rows of an array, which ascend."""
    if not wanted:
        return
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        shape, dtype = _header(file, archive.getinfo(f"{name}.npy").file_size)
        start, size = file.tell(), math.prod(shape[1:]) * dtype.itemsize
        for row in wanted:
            file.seek(start + row * size)
            yield np.ndarray(shape[1:], dtype, file.read(size))


def pixels_of(image: np.ndarray) -> np.ndarray:
    """Return the pixels (H, W) or (H, W, C) of one image of an array, uint8 or uint16.

    Args:
        image: (H, W), (H, W, C) or (C, H, W): bool, uint16, other whole numbers from 0 to 255, or floats from 0 to 1.

    Raises:
        ValueError: values of another range.
    """
    if image.ndim == 3 and image.shape[-1] not in CHANNELS:
        image = image.transpose(1, 2, 0)
    if image.dtype == np.uint8 or (image.dtype.kind == "u" and image.dtype.itemsize == 2):
        return np.ascontiguousarray(image, image.dtype.newbyteorder("="))
    most = 1 if image.dtype.kind in "bf" else 255
    low, high = image.min(initial=0), image.max(initial=0)
    if not (low >= 0 and high <= most):  # also where one is not a number
        raise ValueError(f"its values are from {low} to {high}, expected 0 to {most}")
    return np.round(image * (255.0 / most)).astype(np.uint8)


def digits_source() -> Offers:
    """List scikit-learn's 1,797 handwritten digits: 8×8 pixels, 17 grey levels, no test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0..16 → 0..255, the whole range of a byte
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    names = [str(name) for name in digits.target_names]
    listing = Listing()
    for row, (image, label) in enumerate(zip(pixels, digits.target.tolist(), strict=True)):
        listing.add(f"{DIGITS}/{row}", "train", names[label], None, _digest(image))
    return listing.offers(partial(_array_reads, [pixels]), names)


def _digest(image: np.ndarray) -> str:
    return f"{zlib.crc32(image.tobytes()):08x}"


def _array_reads(arrays: list[np.ndarray], positions: Sequence[int]) -> Iterator[Read]:
    starts = np.cumsum([0, *(len(array) for array in arrays)])
    for position in positions:
        part = int(np.searchsorted(starts, position, side="right")) - 1
        yield partial(pixels_of, arrays[part][position - int(starts[part])])


def torchvision_source(name: str, root: Path) -> Offers:
    """List a data set of `torchvision.datasets`. Its files are below `root`; those that are not are downloaded once.

    Raises:
        LgpError: there is no such data set, or it can be neither found nor downloaded.
    """
    if name not in TORCHVISION:
        raise LgpError(f"torchvision:{name} is not known: valid are {', '.join(sorted(TORCHVISION))}")
    parts = {word: _torchvision_part(name, root, value) for word, value in TORCHVISION[name].items()}
    listing = Listing()
    arrays: list[np.ndarray] = []
    files: list[Path] = []
    classes: list[str] = []
    for word, part in parts.items():
        names = [", ".join(c) if isinstance(c, tuple) else str(c) for c in getattr(part, "classes", [])]
        classes += names
        labels, of_part = _labels_and_files(part)
        if of_part is None:
            arrays.append(np.asarray(part.data))
        else:
            files += of_part
        for row, label in enumerate(labels):
            path = f"{word}/{row}" if of_part is None else os.path.relpath(of_part[row], root)
            state = _digest(arrays[-1][row]) if of_part is None else state_of(of_part[row])
            listing.add(path, word, names[label] if names and label >= 0 else class_name(label, path), None, state)
    return listing.offers(partial(_array_reads, arrays) if arrays else partial(_file_reads, files), classes)


def _torchvision_part(name: str, root: Path, value: bool | str | None) -> Any:
    from torchvision import datasets

    settings = {} if value is None else {"train" if isinstance(value, bool) else "split": value}
    make = partial(getattr(datasets, name), str(root), **settings)
    try:
        try:
            return make(download=False)
        except RuntimeError:  # it is not there yet
            root.mkdir(parents=True, exist_ok=True)
            return make(download=True)
    except (*DAMAGED, ImportError) as e:
        raise LgpError(
            f"torchvision:{name} is not below {root}, and cannot be downloaded: {one_line(e)}; check the network, or "
            "copy the files there as torchvision has them"
        ) from None


def _labels_and_files(part: Any) -> tuple[list[int], list[Path] | None]:
    """Return the labels of a data set of torchvision, and its files, None for arrays in memory."""
    samples = getattr(part, "_samples", getattr(part, "samples", None))
    if samples is not None:
        return [int(label) for _, label in samples], [Path(file) for file, _ in samples]
    files = getattr(part, "_image_files", getattr(part, "_images", None))
    labels = next(getattr(part, key) for key in ("targets", "labels", "_labels") if hasattr(part, key))
    return [int(label) for label in labels], None if files is None else [Path(file) for file in files]


def _file_reads(files: list[Path], positions: Sequence[int]) -> Iterator[Read]:
    return (partial(read_file, str(files[i])) for i in positions)
