"""What the modules of all layouts share: columns that grow, and what a cell, a word or a name means."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lgp.data.sources.offers import SPLITS, UNLABELED, USUAL, Columns, Offers, Read, Skipped, natural_order
from lgp.errors import LgpError

CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin", "lost+found"}

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".tga"),
)


@dataclass
class Listing:
    """The columns of `Offers`, while they grow."""

    paths: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    clutter: list[Skipped] = field(default_factory=list)

    def add(self, path: str, word: str | None, label: str | None, group: object, state: str) -> None:
        """Add an image. `word` is the word of `SPLITS` that its split has in the source, None for unknown."""
        self.paths.append(path)
        self.splits.append(SPLITS[word or "train"])
        self.labels.append(None if word in UNLABELED else label)
        self.groups.append(group_name(group))
        self.states.append(state)

    def offers(self, reads: Callable[[Sequence[int]], Iterator[Read]], declared: Iterable[str] = ()) -> Offers:
        """Return what is listed. Class names that the source declares come first, in its order."""
        names = list(dict.fromkeys(declared))
        found = natural_order(label for label in set(self.labels) - set(names) if label is not None)
        return Offers(
            self.paths,
            self.splits,
            self.labels,
            self.groups,
            self.states,
            names + found,
            reads,
            self.skipped,
            self.clutter,
            declared=bool(names),
        )


def group_name(value: object) -> str | None:
    """Return the group that a cell holds, None for a missing value or a blank text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return unicodedata.normalize("NFC", str(value).strip()) or None


def class_name(value: object, where: str) -> str | None:
    """Return the class name that a cell holds, None for a missing value, an empty text or -1.

    Raises:
        LgpError: the cell holds several labels, a number that is not whole, or no label at all. `where` names the cell.
    """
    if isinstance(value, bytes):
        value = value.decode(errors="backslashreplace")
    if isinstance(value, float):
        value = _whole(value, where)
    if value is None or value == -1 or (isinstance(value, str) and value.strip() in ("", "-1")):
        return None
    if isinstance(value, list | tuple | dict):
        raise LgpError(f"{where} has the label {_short(value)}: several labels an image are not supported; give one")
    if not isinstance(value, str | int):
        raise LgpError(f"{where} has a label of type {type(value).__name__}: give text or whole numbers")
    return str(value)


def _whole(value: float, where: str) -> int | None:
    if math.isnan(value):
        return None
    if not value.is_integer():
        raise LgpError(f"{where} has the label {value}: a number that is not whole names no class; give classes")
    return int(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}…"


def split_word(text: str) -> str | None:
    """Return the first word of a name that names a split (`train-00000-of-00004`), lower case, None without one."""
    return next((word for word in re.split(r"[^a-z]+", text.lower()) if word in SPLITS), None)


def split_of_cell(value: object, where: str) -> str | None:
    """Return the word of `SPLITS` that a cell holds, None for a missing value or an empty text.

    Raises:
        LgpError: the cell holds another word.
    """
    text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
    word = "" if text is None else str(text).strip().lower()
    if word and word not in SPLITS:
        raise LgpError(f"{where} has the split {value!r}: valid are {', '.join(SPLITS)}")
    return word or None


def column_of(present: Sequence[str], columns: Columns, role: str) -> str | None:
    """Return the name of the column for a role: the given one, else the first usual one, None if it is not present.

    Args:
        present: names of the columns that the table has.
        columns: the given names.
        role: image, label, split or group.
    """
    given = getattr(columns, role)
    candidates = USUAL[role] if given is None else (given,)
    return next((name for name in candidates if name in present), None)


def is_clutter(path: str) -> bool:
    """Return whether a relative path with `/` is of an operating system or viewer, or hidden."""
    return any(part.startswith(".") or part.lower() in CLUTTER for part in path.split("/"))


def printable(name: str) -> str:
    """Return a file's name as text that can be encoded. Bytes that are not UTF-8 are written as hexadecimal numbers."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def fail(reason: str) -> bytes:
    """Stand for an image that cannot be read: raise `ValueError` with the reason."""
    raise ValueError(reason)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
