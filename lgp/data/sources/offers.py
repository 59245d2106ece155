"""What a source offers: a column per property, an entry per image, and a way to read the images.

Listing decodes nothing and imports little: the stage `inputs` lists the source with every `dvc repro`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SPLITS = {
    **dict.fromkeys(("train", "training", "unlabeled", "unlabelled"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
UNLABELED = ("unlabeled", "unlabelled")  # images of training whose folders are no classes

Read = Callable[[], "bytes | np.ndarray"]
"""Reads one image: the encoded bytes, or pixels (H, W) or (H, W, C) of numbers. It can be pickled. It may raise."""


def read_file(path: str) -> bytes:
    """Read an ordinary file: `functools.partial(read_file, path)` is the `Read` of an image that is such a file."""
    with open(path, "rb") as file:
        return file.read()


def bytes_of(read: Read) -> int | None:
    """Return the bytes that a `Read` holds, or is to read; 0 for a file that is gone; None where it does not say.

    A `Read` of a part of a file says it by the keyword `size`.
    """
    if not isinstance(read, partial):
        return None
    if read.func is read_file:
        try:
            return os.stat(read.args[0]).st_size
        except (OSError, ValueError):  # a path with a null character is a ValueError
            return 0
    import numpy as np

    held = [_bytes_in(value) for value in read.args if isinstance(value, bytes | np.ndarray | list)]
    return sum(held) if held else read.keywords.get("size")


def _bytes_in(value: "bytes | np.ndarray | list[Any]") -> int:
    if isinstance(value, list):
        return sum(map(_bytes_in, value)) if value and isinstance(value[0], list) else 8 * len(value)
    return len(value) if isinstance(value, bytes) else value.nbytes


def state_text(about: os.stat_result) -> str:
    """Return what changes where a file changes: its size and time."""
    return f"{about.st_size}-{about.st_mtime_ns}"


def roots_of(root: str | os.PathLike[str]) -> tuple[tuple[str, str], ...]:
    """Return `Offers.roots` of a source whose paths start at a folder: as it is called, and where it really is."""
    return tuple(dict.fromkeys(("", place) for place in (os.path.abspath(root), os.path.realpath(root))))


class Skipped(NamedTuple):
    """A file or row that is no image of the data set, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Offers:
    """The images of one source, as columns of equal length.

    Attributes:
        paths: the name of each image within its source. All differ.
        splits: train, val or test. An image of unknown split is of train.
        labels: class name, None without a label.
        groups: what an image has in common with others (patient, scene, video), None where nothing is known.
        states: what changes where the bytes of an image change: size and time of its file, or a digest.
        classes: class names in order. Names that the source declares come first, also those without an image.
        reads: `reads(positions)` returns an iterator over a `Read` for each of these positions, which ascend. It reads
            files from their beginning to their end once.
        skipped: what else was found, with the reason. Entries and skipped together are all that was found.
        clutter: as `skipped`, but files of operating systems and viewers (Thumbs.db): nobody meant them as images.
        declared: whether the order of `classes` is the source's own, so that a number is an index into it.
        roots: how the paths of a source's images begin, and the absolute path of the folder in which the rest of them
            are. A folder that is reached by a link has two. None of images that are no files.
        notes: what a person should be told of what was found, a sentence each.
    """

    paths: list[str]
    splits: list[str]
    labels: list[str | None]
    groups: list[str | None]
    states: list[str]
    classes: list[str]
    reads: Callable[[Sequence[int]], Iterator[Read]]
    skipped: list[Skipped] = field(default_factory=list)
    clutter: list[Skipped] = field(default_factory=list)
    declared: bool = False
    roots: tuple[tuple[str, str], ...] = ()
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)


class Columns(NamedTuple):
    """The names of columns in a table. None: the first of the usual names that the table has.

    `label` may hold text or numbers. A missing value, an empty text or -1 means: without a label.
    """

    image: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None


USUAL = {
    "image": ("image", "img", "path", "file", "file_name", "filename", "image_path", "filepath", "name"),
    "label": ("label", "labels", "fine_label", "class", "class_name", "target", "y", "category"),
    "split": ("split", "part", "subset", "set"),
    "group": ("group", "patient", "patient_id", "scene", "video"),
}


def natural_order(names: Iterable[str]) -> list[str]:
    """Return the different names in order: by number if all are whole numbers, else as text."""
    found = set(names)
    return sorted(found, key=lambda n: (int(n), n)) if all(n.isdecimal() for n in found) else sorted(found)
