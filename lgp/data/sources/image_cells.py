"""An image in a cell of a table: its bytes, its pixels, or the path of its file."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgp.data.sources.listing import fail
from lgp.data.sources.offers import Read, read_file, state_text
from lgp.errors import one_line

if TYPE_CHECKING:
    import numpy as np


def inside(root: Path, folder: Path, path: str) -> Path | None:
    """Return the file that a table in `folder` names, None if it lies outside `root`."""
    file = within(os.path.abspath(root), os.path.join(os.path.abspath(folder), path))
    return Path(file) if file else None


def within(root: str, path: str) -> str | None:
    """Return the place of a path that starts at `root`, which is absolute and plain. None: it lies outside."""
    file = os.path.normpath(os.path.join(root, path))
    return file if file == root or file.startswith(os.path.join(root, "")) else None


def state_of(file: Path) -> str:
    """Return what changes where a file changes: its size and time, or that it is missing."""
    try:
        return state_text(file.stat())
    except (OSError, ValueError):  # a path with a null character is a ValueError
        return "missing"


def read_of(value: object, root: Path, folder: Path) -> Read:
    """Return how to read the image in a cell. An error in its place was met in reading the table.

    Args:
        value: bytes, numbers, a path, or `datasets`' struct of bytes and path.
        root: no file outside it is read.
        folder: where paths start.
    """
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, Exception):
        return partial(fail, f"its part of the table is damaged: {one_line(value)}")
    if isinstance(value, bytes):
        return partial(same, value)
    if isinstance(value, list):
        return partial(_of_numbers, value)
    if not isinstance(value, str):
        return partial(fail, "no image in this row")
    file = inside(root, folder, value)
    return partial(read_file, str(file)) if file else partial(fail, f"its path {value!r} leads out of the source")


def same(data: bytes) -> bytes:
    """Read an image that was read with its table."""
    return data


def _of_numbers(value: list[Any]) -> "bytes | np.ndarray":
    """Return a list of bytes as encoded bytes, and lists of lists as pixels."""
    import numpy as np

    numbers = np.array(value)
    if numbers.dtype.kind not in "iu" or numbers.min(initial=0) < 0 or numbers.max(initial=0) > 255:
        raise ValueError("its numbers are not whole ones from 0 to 255")
    pixels = numbers.astype(np.uint8)
    return pixels.tobytes() if pixels.ndim == 1 else pixels
