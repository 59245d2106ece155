"""An image folder, walked once: every file is an image of the data set, or is listed with a reason.

| layout | read as |
|---|---|
| `train/CLASS/…`, `val/CLASS/…`, `test/CLASS/…` | given splits; a class is a folder in one, and all below it |
| `CLASS/…` | classes without splits |
| files only, or one folder of files | images without labels |
| `unlabeled/…` beside `train` | images of training without labels, whatever its folders are called |

Names of splits count in any case, also `training`, `valid`, `validation`, `testing` and `unlabelled`. Folders above all
of these say nothing. A `metadata.csv` or `labels.csv` (or `.jsonl`, `.parquet`) labels the images of its folder, whose
folders are then no classes. A folder without images is a class if it is empty, beside folders of classes.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lgp.data.sources.cells import is_clutter, printable
from lgp.data.sources.listing import LISTS, Listing, by_folders, rule_of
from lgp.data.sources.offers import SPLITS, Columns, Offers, Read, Skipped, read_file, roots_of, state_text
from lgp.errors import LgpError

NO_IMAGES = {
    "csv", "tsv", "txt", "md", "rst", "json", "jsonl", "ndjson", "parquet", "arrow", "feather", "h5", "hdf5",
    "yaml", "yml", "xml", "html", "htm", "log", "pdf", "doc", "docx", "xls", "xlsx", "py", "ipynb", "sh", "mat",
    "pkl", "pt", "pth", "npy", "npz", "safetensors", "tfrecord", "db", "sqlite", "ini", "cfg", "dvc", "sha256",
    "md5", "zip", "tar", "gz", "tgz", "bz2", "xz", "7z", "rar", "mp4", "avi", "mov", "mkv", "mp3", "wav", "svg",
    "eps", "ps", "dcm",
}  # fmt: skip
"""Endings of files that nobody means as images."""
SHARED = "a link to a folder that is read anyway, holds one that is, or lies in one"


@dataclass
class Walk:
    """What a walk over a folder found. Paths are relative to the root, with `/`, as the system has them.

    Attributes:
        root: of the folder.
        files: path → state of each regular file that may be an image.
        folders: all of them.
        no_classes: folders that hold other folders, or files that are no images. Without an image, they are no classes.
        lists: tables that label images.
        skipped: what cannot be read.
        clutter: what nobody means as an image.
        read: the real paths of folders that are read.
    """

    root: Path
    files: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    no_classes: set[str] = field(default_factory=set)
    lists: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    clutter: list[Skipped] = field(default_factory=list)
    read: list[str] = field(default_factory=list)

    def all(self) -> None:
        """Walk the folder and all below it, in the order of names. A folder may be as deep as the system allows."""
        open_folders = [self._entries("")]
        while open_folders:
            entry, path = next(open_folders[-1], (None, ""))
            if entry is None:
                open_folders.pop()
            elif self._is_folder(entry, path):
                self.folders.append(path)
                self.no_classes.add(path.rpartition("/")[0])
                open_folders.append(self._entries(path))

    def _entries(self, folder: str) -> Iterator[tuple[os.DirEntry[str], str]]:
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as e:
            self.skipped.append(Skipped(printable(folder), f"a folder that cannot be read: {e.strerror}"))
            return
        for entry in found:
            yield entry, f"{folder}/{entry.name}" if folder else entry.name

    def _is_folder(self, entry: os.DirEntry[str], path: str) -> bool:
        """Return whether an entry is a folder to walk. List it if it is none."""
        if is_clutter(entry.name):
            self.clutter.append(Skipped(printable(path), "hidden, or of the operating system"))
        elif entry.is_dir(follow_symlinks=False):
            return True
        elif entry.is_symlink() and os.path.isdir(entry.path):
            return self._follows(entry, path)
        else:
            self._take_file(entry, path)
        return False

    def _follows(self, entry: os.DirEntry[str], path: str) -> bool:
        """Return whether to follow a link to a folder: no image would then be read twice."""
        real = os.path.realpath(entry.path)
        if any(_overlap(real, other) for other in self.read):
            self.skipped.append(Skipped(printable(path), SHARED))
            return False
        self.read.append(real)
        return True

    def _take_file(self, entry: os.DirEntry[str], path: str) -> None:
        try:
            about = entry.stat()
        except OSError as e:
            reason = "a link to nothing" if entry.is_symlink() else f"cannot be read: {e.strerror}"
            self.skipped.append(Skipped(printable(path), reason))
            return
        stem, _, ending = entry.name.lower().rpartition(".")
        if not stat.S_ISREG(about.st_mode):
            self.skipped.append(Skipped(printable(path), "neither a file nor a folder: a pipe, a socket or a device"))
        elif stem and ending in NO_IMAGES:
            self.clutter.append(Skipped(printable(path), f"no image by its name (.{ending})"))
            self.no_classes.add(path.rpartition("/")[0])
            self.lists += [path] if entry.name.lower() in LISTS else []
        else:
            self.files[path] = state_text(about)


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def walk_folder(root: Path) -> Walk:
    """Find everything in a folder."""
    walk = Walk(root, read=_read_anyway(root))
    walk.all()
    return walk


def folder_source(root: Path, class_folders: bool = True, columns: Columns = Columns()) -> Offers:
    """Walk an image folder, and list it as `folder_offers` does."""
    return folder_offers(walk_folder(root), class_folders, columns)


def folder_offers(walk: Walk, class_folders: bool, columns: Columns) -> Offers:
    """List an image folder.

    Args:
        walk: what was found in it.
        class_folders: whether folders are classes. Without, images of `CLASS/…` have no label.
        columns: of the tables that label images.
    """
    listing = Listing(skipped=list(walk.skipped), clutter=list(walk.clutter))
    places = []
    for (path, state), of_folders in zip(walk.files.items(), by_folders(list(walk.files)), strict=True):
        if of_folders is None:
            listing.skipped.append(Skipped(printable(path), "beside folders of splits, and in none of them"))
            continue
        listing.add(printable(path), of_folders.word, of_folders.label if class_folders else None, None, state)
        places.append(path)
    offers = listing.offers(partial(_reads, walk.root, places), more=_empty_classes(walk) if class_folders else ())
    offers = replace(offers, roots=roots_of(walk.root))
    for path in walk.lists:
        labelled = _with_list(offers, walk.root / path, printable(path.rpartition("/")[0]), columns)
        if labelled is not offers:
            read = Skipped(printable(path), "no image, but its labels are read")
            offers = replace(labelled, clutter=[read if it.path == read.path else it for it in labelled.clutter])
    return offers


def single_image(file: Path) -> Offers:
    """Return one file as a source. Raise `LgpError` if there is none."""
    if not file.is_file():
        raise LgpError(f"no file {file}: give an image")
    listing = Listing()
    listing.add(printable(file.name), None, None, None, state_text(file.stat()))
    return listing.offers(partial(_reads, file.parent, [file.name]))


def _empty_classes(walk: Walk) -> list[str]:
    """Return the classes of folders in which nothing is."""
    rule = rule_of(list(dict.fromkeys(path.rpartition("/")[0] for path in walk.files)))
    said = [rule(folder) for folder in walk.folders if folder not in walk.no_classes]
    return [of_folder.label for of_folder in said if of_folder is not None and of_folder.label is not None]


def _read_anyway(root: Path) -> list[str]:
    """Return the real paths of the folders that are read without a link: those of the splits, else the whole root."""
    of_splits = [entry for entry in root.iterdir() if entry.name.lower() in SPLITS and entry.is_dir()]
    return [os.path.realpath(folder) for folder in of_splits if not folder.is_symlink()] or [os.path.realpath(root)]


def _reads(root: Path, places: Sequence[str], positions: Sequence[int]) -> Iterator[Read]:
    return (partial(read_file, os.path.join(root, places[i])) for i in positions)


def _with_list(offers: Offers, file: Path, below: str, columns: Columns) -> Offers:
    """Label the images of a folder by a table that lies in it, if it has paths."""
    from lgp.data.sources.manifest import label_offers, listed, read_rows, table_of

    if file.suffix.lower() == ".parquet" and not _holds_paths(file, columns):
        return offers
    rows = read_rows(file)
    if not len(rows.cells.numbers) or rows.column("image", columns) is None:
        return offers
    table = table_of(rows, columns)
    if any(label is not None for label in table.labels):
        inside = [path.startswith(f"{below}/" if below else "") for path in offers.paths]
        labels = [None if lies else label for lies, label in zip(inside, offers.labels, strict=True)]
        offers = replace(offers, labels=labels, classes=[name for name in offers.classes if name in labels])
    return listed(*label_offers(offers, table, below), table)


def _holds_paths(file: Path, columns: Columns) -> bool:
    from lgp.data.sources.tables import holds_paths

    return holds_paths(file, columns)
