"""An image folder, walked once: every file is an image of the data set, or is listed with a reason.

| layout | read as |
|---|---|
| `train/CLASS/…`, `val/CLASS/…`, `test/CLASS/…` | given splits; a class is a folder in one, and all below it |
| `CLASS/…` | classes without splits |
| files only | images without labels |
| `unlabeled/…` beside `train` | images of training without labels, whatever its folders are called |

Names of splits count in any case, also `training`, `valid`, `validation`, `testing` and `unlabelled`. A
`metadata.csv` or `metadata.jsonl` (Hugging Face's image folder) labels the images of its folder.
"""

import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lgp.data.sources.listing import is_clutter, printable
from lgp.data.sources.offers import SPLITS, UNLABELED, Columns, Offers, Read, Skipped, natural_order, read_file

NO_IMAGES = {
    *(
        "csv",
        "tsv",
        "txt",
        "md",
        "rst",
        "json",
        "jsonl",
        "yaml",
        "yml",
        "xml",
        "html",
        "htm",
        "log",
        "pdf",
        "doc",
        "docx",
    ),
    *(
        "xls",
        "xlsx",
        "py",
        "ipynb",
        "sh",
        "mat",
        "pkl",
        "pt",
        "pth",
        "npy",
        "db",
        "sqlite",
        "ini",
        "cfg",
        "dvc",
        "sha256",
        "md5",
    ),
    *(
        "zip",
        "tar",
        "gz",
        "tgz",
        "bz2",
        "xz",
        "7z",
        "rar",
        "mp4",
        "avi",
        "mov",
        "mkv",
        "mp3",
        "wav",
        "svg",
        "eps",
        "ps",
        "dcm",
    ),
}
METADATA = ("metadata.csv", "metadata.jsonl")
SHARED = "a link to a folder that is read anyway, holds one that is, or lies in one"


@dataclass(frozen=True)
class _Found:
    """A regular file: its path below the root as the system has it, and what changes where its bytes change."""

    path: str
    state: str


@dataclass
class _Walk:
    """What a walk found. Paths are relative to the root, with `/`."""

    root: Path
    files: list[_Found] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    clutter: list[Skipped] = field(default_factory=list)
    read: list[str] = field(default_factory=list)  # real paths of folders that are read

    def enter(self, inside: str) -> None:
        """Walk a folder in the order of its names."""
        try:
            with os.scandir(self.root / inside) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as e:
            self.skipped.append(Skipped(printable(inside), f"a folder that cannot be read: {e.strerror}"))
            return
        for entry in found:
            self._take(entry, f"{inside}/{entry.name}" if inside else entry.name)

    def _take(self, entry: os.DirEntry[str], path: str) -> None:
        if is_clutter(entry.name):
            self.clutter.append(Skipped(printable(path), "hidden, or of the operating system"))
        elif entry.is_dir(follow_symlinks=False):
            self.folders.append(path)
            self.enter(path)
        elif entry.is_symlink() and os.path.isdir(entry.path):
            self._follow(entry, path)
        else:
            self._take_file(entry, path)

    def _follow(self, entry: os.DirEntry[str], path: str) -> None:
        """Follow a link to a folder, if no image would then be read twice."""
        real = os.path.realpath(entry.path)
        if any(_overlap(real, other) for other in self.read):
            self.skipped.append(Skipped(printable(path), SHARED))
            return
        self.read.append(real)
        self.folders.append(path)
        self.enter(path)

    def _take_file(self, entry: os.DirEntry[str], path: str) -> None:
        try:
            about = entry.stat()
        except OSError as e:
            reason = "a link to nothing" if entry.is_symlink() else f"cannot be read: {e.strerror}"
            self.skipped.append(Skipped(printable(path), reason))
            return
        suffix = entry.name.rpartition(".")[2].lower()
        if not stat.S_ISREG(about.st_mode):
            self.skipped.append(Skipped(printable(path), "neither a file nor a folder: a pipe, a socket or a device"))
        elif suffix in NO_IMAGES and suffix != entry.name.lower():
            self.clutter.append(Skipped(printable(path), f"no image by its name (.{suffix})"))
        else:
            self.files.append(_Found(path, f"{about.st_size}:{about.st_mtime_ns}"))


def class_name(folder: str) -> str:
    """Return the class of a folder. Names that look the same are the same (Unicode's form NFC)."""
    return unicodedata.normalize("NFC", printable(folder))


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def folder_source(root: Path, class_folders: bool = True, columns: Columns = Columns()) -> Offers:
    """List an image folder.

    Args:
        root: of the folder.
        class_folders: whether folders are classes. Without, images of `CLASS/…` have no label.
        columns: of the metadata files.
    """
    walk = _Walk(root, read=_read_anyway(root))
    walk.enter("")
    top = [path for path in walk.folders if "/" not in path]
    split_of = {name: SPLITS[name.lower()] for name in top if name.lower() in SPLITS}
    has_splits = _has_splits(walk, split_of, top)
    paths: list[str] = []
    splits: list[str] = []
    labels: list[str | None] = []
    states: list[str] = []
    places: list[str] = []
    for file in walk.files:
        first, _, rest = file.path.partition("/")
        if has_splits and first not in split_of:
            walk.skipped.append(
                Skipped(printable(file.path), f"beside {', '.join(map(printable, split_of))}: in none of them")
            )
            continue
        split, below = (split_of[first], rest) if has_splits else ("train", file.path)
        folder = below.partition("/")[0] if "/" in below else None
        named = class_folders and folder is not None and not (has_splits and first.lower() in UNLABELED)
        paths.append(printable(file.path))
        places.append(file.path)
        splits.append(split)
        labels.append(class_name(folder) if named and folder is not None else None)
        states.append(file.state)
    classes = _class_folders(walk, split_of if has_splits else {}) if class_folders else []
    offers = Offers(
        paths, splits, labels, [None] * len(paths), states, natural_order(map(class_name, classes)),
        partial(_reads, root, places), walk.skipped, walk.clutter,
    )  # fmt: skip
    return _with_metadata(offers, root, split_of if has_splits else {}, columns)


def _read_anyway(root: Path) -> list[str]:
    """Return the real paths of the folders that are read without a link: those of the splits, else the whole root."""
    of_splits = [entry for entry in root.iterdir() if entry.name.lower() in SPLITS and entry.is_dir()]
    return [os.path.realpath(folder) for folder in of_splits if not folder.is_symlink()] or [os.path.realpath(root)]


def _has_splits(walk: _Walk, split_of: dict[str, str], top: list[str]) -> bool:
    """Return whether the folders at the top are splits. `train` beside other flat folders is a class (of vehicles)."""
    if not split_of or len(split_of) == len(top):
        return bool(split_of)
    flat = all(file.path.count("/") <= 1 for file in walk.files)
    return "train" in split_of.values() and not flat


def _class_folders(walk: _Walk, split_of: dict[str, str]) -> set[str]:
    """Return the names of folders that are classes, also of those that hold no image."""
    if not split_of:
        return {path for path in walk.folders if "/" not in path}
    inside = (path.split("/") for path in walk.folders)
    return {
        parts[1] for parts in inside if len(parts) == 2 and parts[0] in split_of and parts[0].lower() not in UNLABELED
    }


def _reads(root: Path, places: Sequence[str], positions: Sequence[int]) -> Iterator[Read]:
    return (partial(read_file, os.path.join(root, places[i])) for i in positions)


def _with_metadata(offers: Offers, root: Path, splits: dict[str, str], columns: Columns) -> Offers:
    """Label the images by the metadata files at the top of the folder and of its splits, if they have paths."""
    from lgp.data.sources.manifest import has_paths, label_offers, read_table

    for below in ("", *splits):
        for name in METADATA:
            file = root / below / name
            if file.is_file() and has_paths(file, columns):
                offers = label_offers(offers, read_table(file, columns), below)
    return offers
