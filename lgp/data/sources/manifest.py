"""A table that names images: CSV, TSV, JSON lines, or Parquet with paths.

It labels images of other sources, or opens its own.

A row has a path, and may have a label, a split and a group. A path starts at the folder of the table, or at `root`. It
never leaves that folder. An empty label means: without a label, as in a selection that nobody has filled in yet.
"""

import csv
import os
import posixpath
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from lgp.data.sources.cells import (
    Cells,
    cells_of,
    class_name,
    column_of,
    meanings,
    note_on_columns,
    plain_text,
    printable,
    split_words,
)
from lgp.data.sources.image_cells import within
from lgp.data.sources.listing import Listing, fail
from lgp.data.sources.offers import (
    SPLITS,
    UNLABELED,
    USUAL,
    Columns,
    Offers,
    Read,
    Skipped,
    natural_order,
    read_file,
    roots_of,
    state_text,
)
from lgp.errors import LgpError, one_line

SHOWN = 3  # examples in a message
MISSING = "no such file"
OUTSIDE = "a path out of the folder of the table: set `root` to the folder that holds all images"
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
YES_OR_NO = {"0", "1", "0.0", "1.0", "false", "true"}
ODD = re.compile(r"(^|/)\.{0,2}(/|$)")  # `./`, `../`, `//`, and the beginning of an absolute path


@dataclass(frozen=True)
class Table:
    """The rows of a table, as columns of text. None: the table has no such column, or the row no value.

    `paths` are as the file has them. `numbers` says where each row stands, for messages. `notes` are to be told.
    """

    file: Path
    paths: list[str]
    labels: list[str | None]
    splits: list[str | None]
    groups: list[str | None]
    numbers: Sequence[int]
    notes: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Return where a row stands, for messages."""
        return f"row {self.numbers[row]}"

    def said(self, row: int) -> str:
        """Return a row's path and place, for messages and lists."""
        path = printable(self.paths[row].strip())
        return f"{path or '(no path)'} ({self.file.name}, {self.place(row)})"

    def rows(self, chosen: Sequence[int]) -> "Table":
        """Return some of the rows."""
        labels, splits, groups = ([column[i] for i in chosen] for column in (self.labels, self.splits, self.groups))
        paths, numbers = [self.paths[i] for i in chosen], [self.numbers[i] for i in chosen]
        return Table(self.file, paths, labels, splits, groups, numbers)

    def in_split(self, word: str | None) -> "Table":
        """Return the table with a split for the rows that say none. An image that nobody gives a split is of train."""
        if word in UNLABELED:
            pairs = zip(self.labels, self.splits, strict=True)
            return replace(self, labels=[label if own else None for label, own in pairs])
        if word is None or SPLITS[word] == "train":
            return self
        return replace(self, splits=[own or word for own in self.splits])


@dataclass(frozen=True)
class Rows:
    """The rows of a table as they stand in its file."""

    file: Path
    cells: Cells

    @property
    def header(self) -> list[Any]:
        """The names of the columns."""
        return list(self.cells.columns)

    def column(self, role: str, columns: Columns) -> str | None:
        """Return the name of the column for a role, None if there is none."""
        return column_of(self.header, columns, role)

    def known(self, columns: Columns) -> Columns:
        """Return those of the given names that the table has. The usual names take the place of the others."""
        return Columns(*(name if name in self.cells.columns else None for name in columns))


def read_rows(file: Path) -> Rows:
    """Read a table. Raise `LgpError` if it cannot be read."""
    try:
        return Rows(file, cells_of(file.name, file.read_bytes()))
    except (OSError, ValueError, RecursionError, csv.Error) as e:
        raise LgpError(
            f"{file} cannot be read as a table ({one_line(e)}): mend it, or give "
            "CSV, TSV or JSON lines in UTF-8, or Parquet"
        ) from None


def table_of(rows: Rows, columns: Columns) -> Table:
    """Return what rows say of images.

    Raises:
        LgpError: there is no column of paths, a given column is missing, or there are several labels or measured values
            for an image.
    """
    file, (cells, numbers), header = rows.file, rows.cells, ", ".join(map(str, rows.header))
    if not len(numbers):
        raise LgpError(f"{file} has no row below its names of columns: fill it in, or remove it")
    for role, given in columns._asdict().items():
        if given is not None and given not in cells:
            raise LgpError(f"{file} has no column {given!r} (data.columns.{role}), only {header}: mend the name")
    named = {role: rows.column(role, columns) for role in Columns._fields}
    if named["image"] is None:
        raise LgpError(
            f"{file} has the columns {header}, none of them of paths: call one `path`, or name it with data.columns: "
            "{image: COLUMN}"
        )
    _refuse_one_hot(rows, named)

    def where(row: int) -> str:
        return f"{file}: row {numbers[row]}"

    def values(role: str) -> list[Any]:
        name = named[role]
        return cells[name] if name is not None else [None] * len(numbers)

    table = Table(
        file,
        [value if isinstance(value, str) else plain_text(value) or "" for value in values("image")],
        meanings(values("label"), lambda value, row: class_name(value, where(row))),
        split_words(values("split"), named["split"], columns, where),
        meanings(values("group"), lambda value, _: plain_text(value)),
        numbers,
    )
    if not any(table.splits) and any(meanings(values("split"), lambda value, _: plain_text(value))):
        named["split"] = None  # a column that has the name of splits by chance
    table = replace(table, notes=tuple(note_on_columns(file.name, rows.header, named)))
    _refuse_regression(table)
    _refuse_several_labels(table)
    return table


def read_table(file: Path, columns: Columns = Columns()) -> Table:
    """Read a table of images, as `table_of` does."""
    return table_of(read_rows(file), columns)


def _refuse_one_hot(rows: Rows, named: dict[str, str | None]) -> None:
    """Refuse a table that has a column of 0 and 1 for each class, and no column of labels."""
    if named["label"] is not None:
        return
    others = {name: cells for name, cells in rows.cells.columns.items() if name not in named.values()}
    of_classes = [str(name) for name, cells in others.items() if _is_yes_or_no(cells)]
    if len(of_classes) > 1:
        raise LgpError(
            f"{rows.file} has no column of labels, but several of only 0 and 1 ({', '.join(of_classes[:SHOWN])}), as "
            "of one-hot or several labels an image: give one column `label` with the name of the class, or leave these "
            f"columns out (usual names are {', '.join(USUAL['label'])})"
        )


def _is_yes_or_no(cells: Sequence[Any]) -> bool:
    return all(str(cell).strip().lower() in YES_OR_NO for cell in cells)


def _refuse_regression(table: Table) -> None:
    """Refuse labels that are measured values."""
    found = {label for label in table.labels if label is not None}
    fractions = sorted(label for label in found if NUMBER.fullmatch(label) and not float(label).is_integer())
    if fractions and all(map(NUMBER.fullmatch, found)):
        raise LgpError(
            f"{table.file}: the labels are numbers with fractions ({', '.join(fractions[:SHOWN])}), as of a "
            "regression: lgp tells classes apart, give class names or whole numbers"
        )


def _refuse_several_labels(table: Table) -> None:
    """Refuse several labels in one cell: what a mark separates is a label itself, or stands in several labels."""
    found = {label for label in table.labels if label is not None}
    for mark in "|;,":
        parts = {label: set(map(str.strip, label.split(mark))) for label in found if mark in label}
        counts = Counter(part for label in found for part in parts.get(label, {label}) if part)
        shared = {part for part, count in counts.items() if count > 1 and mark != ","}
        several = sorted(label for label, of in parts.items() if of <= found or of & shared)
        if several:
            raise LgpError(
                f"{table.file}: {several[0]!r} names several classes: multi-label images are not supported, give one "
                "class each"
            )


def spellings(path: str) -> list[str]:
    """Return what a row's path may be called, first as it stands: blanks, backslashes, `./`, forms of Unicode."""
    plain = path.strip().replace("\\", "/")
    if plain == path and path.isascii() and not ODD.search(path):
        return [path]
    normal = posixpath.normpath(plain)
    forms = [unicodedata.normalize(form, normal) for form in ("NFC", "NFD")]
    return list(dict.fromkeys([path, path.strip(), plain, normal, *forms]))


class _Row(NamedTuple):
    """The file that a row leads to: its path below the root, and its state, or why it cannot be taken."""

    path: str
    state: str = ""
    fault: str = ""


def table_source(table: Table, root: Path, forgiven: int = 0) -> Offers:
    """Open the images that a table names. Paths start at `root`, and lead to no file outside it.

    Rows that lead to no file are images that cannot be read, of which `data.max_unreadable_share` allows few. Up to
    `forgiven` of them are listed as skipped instead.
    """
    listing, above = Listing(notes=list(table.notes)), os.path.abspath(root)
    names: list[str] = []
    faults: dict[int, _Row] = {}
    reasons: dict[int, str] = {}
    seen: dict[str, int] = {}

    def add(row: int, path: str, state: str) -> None:
        listing.add(printable(path), table.splits[row], table.labels[row], table.groups[row], state)
        names.append(path)

    for row, written in enumerate(table.paths):
        if not written.strip():
            reasons[row] = "a row without a path"
            continue
        found = _leads_to(above, written)
        if found.path in seen:
            _check_same_label(table, seen[found.path], row)
            reasons[row] = f"named before, in {table.place(seen[found.path])}"
            continue
        seen[found.path] = row
        if found.fault:
            faults[row] = found
        else:
            add(row, found.path, found.state)
    opened = len(names)
    if len(faults) <= forgiven:
        reasons |= {row: found.fault for row, found in faults.items()}
        faults = {}
    for row, found in faults.items():
        add(row, found.path, found.fault)
    listing.skipped += [Skipped(table.said(row), reasons[row]) for row in sorted(reasons)]
    reads = partial(_reads, above, names, [None] * opened + [found.fault for found in faults.values()])
    return replace(listing.offers(reads), roots=roots_of(root))


def leads_anywhere(table: Table, root: Path) -> bool:
    """Return whether any row of a table leads to a file below a folder."""
    return any(path.strip() and not _leads_to(os.path.abspath(root), path).fault for path in table.paths)


def _leads_to(root: str, written: str) -> _Row:
    """Return the first spelling of a path that leads to a file, else why the path does not as it stands."""
    first = _look(root, written)
    if not first.fault:
        return first
    others = (_look(root, path) for path in spellings(written)[1:])
    return next((found for found in others if not found.fault), first)


def _look(root: str, path: str) -> _Row:
    file = within(root, path)
    if file is None:
        return _Row(path, fault=OUTSIDE)
    inside = file[len(os.path.join(root, "")) :]
    try:
        about = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return _Row(inside, fault=MISSING)
    except (OSError, ValueError) as e:
        return _Row(inside, fault=f"cannot be read: {getattr(e, 'strerror', None) or e}")
    if not stat.S_ISREG(about.st_mode):
        return _Row(inside, fault="not a file")
    return _Row(inside, state=state_text(about))


def _check_same_label(table: Table, first: int, second: int) -> None:
    one, other = table.labels[first], table.labels[second]
    if one is not None and other is not None and one != other:
        raise LgpError(
            f"{table.file}: {table.paths[second]} is {one!r} in {table.place(first)} and {other!r} in "
            f"{table.place(second)}: an image has one class, remove one of the rows"
        )


def _reads(root: str, names: Sequence[str], faults: Sequence[str | None], positions: Sequence[int]) -> Iterator[Read]:
    for i in positions:
        fault = faults[i]
        lacks = fault is not None and fault != MISSING
        yield partial(fail, str(fault)) if lacks else partial(read_file, os.path.join(root, names[i]))


class ImagesByName:
    """Finds images by their path, or by the end of it at a folder's boundary.

    A name may have more folders than the path of an image, if these are the end of the path of the source's own folder:
    `train/0.png` and `data/train/0.png` are the image `0.png` of the source `data/train`. Names in another form of
    Unicode are the same.
    """

    def __init__(self, offers: Offers) -> None:
        self.paths = offers.paths
        self._roots = [(start, f"/{_normal(root)}") for start, root in offers.roots]
        self._exact = {path: i for i, path in enumerate(offers.paths)}
        self._starts: dict[str, list[str]] = {}  # folders of a name → how the paths of images that it fits start
        self._ends: dict[int, dict[str, list[str]]] = {}  # number of folders → the last ones → folders of images

    def exactly(self, name: str) -> list[int]:
        """Return the image of this path."""
        if name in self._exact:
            return [self._exact[name]]
        return [] if name.isascii() else self._normally.get(_normal(name), [])

    def find(self, name: str) -> list[int]:
        """Return the images that a name fits, in time that does not depend on their number."""
        if exact := self.exactly(name):
            return exact
        folder, slash, file = name.rpartition("/")
        if not slash:
            return self._by_file.get(_normal(file), [])
        if folder not in self._starts:
            self._starts[folder] = [*self._folders_ending(_normal(folder)), *self._below_roots(_normal(folder))]
        found = [i for start in self._starts[folder] for i in self.exactly(start + file)]
        return found if len(found) < 2 else list(dict.fromkeys(found))

    @cached_property
    def _normally(self) -> dict[str, list[int]]:
        return _positions(map(_normal, self.paths))

    @cached_property
    def _by_file(self) -> dict[str, list[int]]:
        return _positions(_normal(path.rpartition("/")[2]) for path in self.paths)

    @cached_property
    def _folders(self) -> list[str]:
        return list(dict.fromkeys(path.rpartition("/")[0] for path in self.paths))

    def _folders_ending(self, folder: str) -> list[str]:
        count = folder.count("/") + 1
        if count not in self._ends:
            ends = defaultdict(list)
            for own in self._folders:
                parts = own.split("/")
                if len(parts) >= count:
                    ends[_normal("/".join(parts[-count:]))].append(f"{own}/")
            self._ends[count] = dict(ends)
        return self._ends[count].get(folder, [])

    def _below_roots(self, folder: str) -> Iterator[str]:
        parts = folder.split("/")
        heads = [("/".join(parts[:n]), parts[n:]) for n in range(1, len(parts) + 1)]
        for start, root in self._roots:
            for head, rest in heads:
                if head and root.endswith(f"/{head}"):
                    yield start + "".join(f"{part}/" for part in rest)


def _positions(names: Iterable[str]) -> dict[str, list[int]]:
    found = defaultdict(list)
    for i, name in enumerate(names):
        found[name].append(i)
    return dict(found)


def _normal(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _named_by(images: ImagesByName, table: Table, written: str, below: str) -> list[int]:
    """Return the images that a row's path fits. Those of a table in a folder are `below` it."""
    if written and not below and (found := images.find(written)):
        return found
    for name in spellings(written) if written.strip() else []:
        if name.startswith("../"):
            name = os.path.normpath(os.path.join(os.path.abspath(table.file.parent), name))
        found = images.exactly(f"{below}/{name}") if below else []
        found = found or [i for i in images.find(name) if not below or images.paths[i].startswith(f"{below}/")]
        if found:
            return found
    return []


def labels_any(offers: Offers, table: Table) -> bool:
    """Return whether a table gives an image a label."""
    images = ImagesByName(offers)
    pairs = zip(table.paths, table.labels, strict=True)
    return any(label is not None and _named_by(images, table, path, "") for path, label in pairs)


def label_offers(offers: Offers, table: Table, below: str = "") -> tuple[Offers, list[int | None]]:
    """Give images the labels, splits and groups of a table. Rows without a label change none.

    Args:
        offers: images of other sources.
        table: the rows.
        below: the folder that the table lies in, within the source.

    Returns:
        The images, and which of them each row names. None: none of them.

    Raises:
        LgpError: a row fits several images, is of another class than a row before, or names a class by a number that
            the source does not have.
    """
    images, classes = ImagesByName(offers), set(offers.classes)
    labels, splits, groups = list(offers.labels), list(offers.splits), list(offers.groups)
    named: list[int | None] = []
    seen: dict[int, int] = {}
    for row, path in enumerate(table.paths):
        found = _named_by(images, table, path, below)
        if len(found) > 1:
            raise LgpError(
                f"{table.file}: {table.place(row)} names {path}, which fits {len(found)} images "
                f"({', '.join(offers.paths[i] for i in found[:SHOWN])}): give more of its path"
            )
        named.append(found[0] if found else None)
        for image in found:
            if image in seen:
                _check_same_label(table, seen[image], row)
            seen[image] = row
            label, word = table.labels[row], table.splits[row]
            if label is not None:
                labels[image] = label if label in classes else _class_of(offers, label, table, row)
            if word is not None:
                splits[image] = SPLITS[word]
                labels[image] = None if word in UNLABELED else labels[image]
            groups[image] = table.groups[row] or groups[image]
    new = natural_order({label for label in labels if label is not None} - classes)
    return replace(offers, labels=labels, splits=splits, groups=groups, classes=[*offers.classes, *new]), named


def listed(offers: Offers, named: Sequence[int | None], table: Table) -> Offers:
    """Return images with the rows that name none of them listed as skipped, and a note of them."""
    unknown = [
        Skipped(table.said(row), "names no image of the source") for row, image in enumerate(named) if image is None
    ]
    notes = [*offers.notes, *table.notes, *note_of(table, unknown, len(named))]
    return replace(offers, skipped=[*offers.skipped, *unknown], notes=notes)


def note_of(table: Table, vain: Sequence[Skipped], rows: int) -> list[str]:
    """Return what is to be told of rows that are left out, nothing without them."""
    if not vain:
        return []
    few = "; ".join(f"{skip.path}: {skip.reason}" for skip in vain[:SHOWN])
    return [f"{len(vain)} of {rows} rows of {table.file.name} are left out ({few})"]


def _class_of(offers: Offers, label: str, table: Table, row: int) -> str:
    """Return a class by its number where the source declares an order, else by its name."""
    if not (offers.declared and label.isdecimal()):
        return label
    if int(label) >= len(offers.classes):
        raise LgpError(
            f"{table.file}: {table.place(row)} has the label {label}, but the source has {len(offers.classes)} "
            f"classes, 0 to {len(offers.classes) - 1}: mend the label, or give class names"
        )
    return offers.classes[int(label)]
