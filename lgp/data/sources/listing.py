"""What the modules of all layouts share: the columns of `Offers` while they grow, and what folders say."""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lgp.data.sources.cells import plain_text, printable
from lgp.data.sources.offers import SPLITS, UNLABELED, Offers, Read, Skipped, natural_order

LISTS = tuple(f"{stem}.{ending}" for stem in ("labels", "metadata") for ending in ("csv", "jsonl", "parquet"))
"""Tables in a folder or an archive that label its images."""


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
    notes: list[str] = field(default_factory=list)

    def add(self, path: str, word: str | None, label: str | None, group: object, state: str) -> None:
        """Add an image. `word` is the word of `SPLITS` that its split has in the source, None for unknown."""
        self.paths.append(path)
        self.splits.append(SPLITS[word or "train"])
        self.labels.append(None if word in UNLABELED else label)  # also where a column says so
        self.groups.append(plain_text(group))
        self.states.append(state)

    def offers(
        self, reads: Callable[[Sequence[int]], Iterator[Read]], declared: Iterable[str] = (), more: Iterable[str] = ()
    ) -> Offers:
        """Return what is listed.

        Args:
            reads: as in `Offers`.
            declared: class names that the source declares. They come first, in its order.
            more: class names that may have no image.
        """
        names = list(dict.fromkeys(declared))
        found = natural_order(label for label in {*self.labels, *more} - set(names) if label is not None)
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
            notes=self.notes,
        )


class OfFolders(NamedTuple):
    """What the folders of an image say: the word of its split, and its class."""

    word: str | None = None
    label: str | None = None


def by_folders(paths: Sequence[str]) -> list[OfFolders | None]:
    """Return what the folders of images say: `train/CLASS/x.jpg`, `CLASS/x.jpg`, whatever folders are above all.

    A folder `train` beside other folders that hold images is a class, if no folder holds classes. One folder that holds
    every image is no class. None: an image beside folders of splits, and in none of them.
    """
    names = [path.rpartition("/")[0] for path in paths]
    different = list(dict.fromkeys(names))
    rule = rule_of(different)
    of_name = {name: rule(name) for name in different}
    return [of_name[name] for name in names]


def rule_of(holders: Sequence[str]) -> Callable[[str], OfFolders | None]:
    """Return what each folder says, as the folders that hold images arrange it: a function of a folder's path."""
    folders = [_parts(name) for name in holders]
    above: tuple[str, ...] = ()
    while folders and _is_above_all(folders):
        above += folders[0][:1]
        folders = [parts[1:] for parts in folders]
    top = {parts[0] for parts in folders if parts}
    flat = all(len(parts) <= 1 for parts in folders)
    has_splits = bool(top) and any(map(_is_split, top)) and not (flat and not all(map(_is_split, top)))
    has_classes = not (flat and len(top) == 1 and all(folders))

    def said(folder: str) -> OfFolders | None:
        parts = _parts(folder)
        if parts[: len(above)] != above:
            return None
        parts = parts[len(above) :]
        return _in_splits(parts) if has_splits else OfFolders(None, _class(parts) if has_classes else None)

    return said


def _parts(folder: str) -> tuple[str, ...]:
    return tuple(folder.split("/")) if folder else ()


def _is_above_all(folders: Sequence[tuple[str, ...]]) -> bool:
    """Return whether one folder, which is no split, holds nothing but folders, and these hold all images."""
    first = folders[0][:1]
    return bool(first) and not _is_split(first[0]) and all(len(p) > 1 and p[:1] == first for p in folders)


def _is_split(name: str) -> bool:
    return name.lower() in SPLITS


def _in_splits(parts: tuple[str, ...]) -> OfFolders | None:
    if not parts or not _is_split(parts[0]):
        return None
    word = parts[0].lower()
    return OfFolders(word, None if word in UNLABELED else _class(parts[1:]))


def _class(parts: tuple[str, ...]) -> str | None:
    """Return the class of a folder. Names that look the same are the same (Unicode's form NFC)."""
    return unicodedata.normalize("NFC", printable(parts[0])) if parts else None


def fail(reason: str) -> bytes:
    """Stand for an image that cannot be read: raise `ValueError` with the reason."""
    raise ValueError(reason)
