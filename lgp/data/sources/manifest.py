"""A table that names images: CSV, TSV, JSON lines, or Parquet with paths.

It labels images of other sources, or opens its own.

A row has a path, and may have a label, a split and a group. A path starts at the folder of the table, or at `root`. It
never leaves that folder. An empty label means: without a label, as in a selection that nobody has filled in yet.
"""

import csv
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lgp.data.sources.cells import class_name, column_of, one_line, plain_text, printable, rows_of, split_words
from lgp.data.sources.image_cells import inside, state_of
from lgp.data.sources.listing import Listing
from lgp.data.sources.offers import SPLITS, Columns, Offers, Read, Skipped, natural_order, read_file
from lgp.errors import LgpError

SHOWN = 3  # examples in a message
MISSING = "no such file"


@dataclass(frozen=True)
class Table:
    """The rows of a table, as columns of text. None: the table has no such column, or the row no value.

    `places` says where each row stands, for messages.
    """

    file: Path
    paths: list[str]
    labels: list[str | None]
    splits: list[str | None]
    groups: list[str | None]
    places: list[str]

    def said(self, row: int) -> str:
        """Return a row's path and place, for messages and lists."""
        return f"{self.paths[row] or '(no path)'} ({self.file.name}, {self.places[row]})"

    def rows(self, chosen: Sequence[int]) -> "Table":
        """Return some of the rows."""
        paths, places = ([column[i] for i in chosen] for column in (self.paths, self.places))
        labels, splits, groups = ([column[i] for i in chosen] for column in (self.labels, self.splits, self.groups))
        return Table(self.file, paths, labels, splits, groups, places)


@dataclass(frozen=True)
class Rows:
    """The rows of a table as they stand in its file. `first` is the number of the first, for messages."""

    file: Path
    rows: list[dict[Any, Any]]
    first: int

    @property
    def header(self) -> list[Any]:
        """The names of the columns."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key is not None))

    def column(self, role: str, columns: Columns) -> str | None:
        """Return the name of the column for a role, None if there is none."""
        return column_of(self.header, columns, role)

    def known(self, columns: Columns) -> Columns:
        """Return those of the given names that the table has. The usual names take the place of the others."""
        return Columns(*(name if name in self.header else None for name in columns))


def read_rows(file: Path) -> Rows:
    """Read a table. Raise `LgpError` if it cannot be read."""
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return Rows(file, pq.read_table(file).to_pylist(), 0)
        text = file.read_text(encoding="utf-8-sig")
        rows = rows_of(file.name, text)
        return Rows(file, rows, 1 if text.lstrip().startswith(("{", "[")) else 2)
    except (OSError, UnicodeError, csv.Error, ValueError) as e:
        raise LgpError(
            f"{file} cannot be read as a table ({one_line(e)}): give CSV, TSV or JSON lines in UTF-8"
        ) from None


def table_of(rows: Rows, columns: Columns) -> Table:
    """Return what rows say of images.

    Raises:
        LgpError: there is no column of paths, a given column is missing, or there are several labels or measured values
            for an image.
    """
    file, header = rows.file, ", ".join(map(str, rows.header))
    if not rows.rows:
        raise LgpError(f"{file} has no row below its names of columns: fill it in, or remove it")
    for role, given in columns._asdict().items():
        if given is not None and given not in rows.header:
            raise LgpError(f"{file} has no column {given!r} (data.columns.{role}), only {header}: mend the name")
    named = {role: rows.column(role, columns) for role in Columns._fields}
    if named["image"] is None:
        raise LgpError(
            f"{file} has the columns {header}, none of them of paths: call one `path`, or name it with data.columns: "
            "{image: COLUMN}"
        )
    values = {role: [row.get(name) if name else None for row in rows.rows] for role, name in named.items()}
    places = [f"row {number}" for number in range(rows.first, rows.first + len(rows.rows))]

    def where(row: int) -> str:
        return f"{file}: {places[row]}"

    table = Table(
        file,
        [(plain_text(value) or "").replace("\\", "/").removeprefix("./") for value in values["image"]],
        [class_name(value, where(row)) for row, value in enumerate(values["label"])],
        split_words(values["split"], named["split"], columns, where),
        [plain_text(value) for value in values["group"]],
        places,
    )
    _refuse_regression(table)
    return table


def read_table(file: Path, columns: Columns = Columns()) -> Table:
    """Read a table of images, as `table_of` does."""
    return table_of(read_rows(file), columns)


def _refuse_regression(table: Table) -> None:
    """Refuse labels that are measured values, and several labels in one cell."""
    found = {label for label in table.labels if label is not None}
    fractions = sorted(label for label in found if _is_fraction(label))
    if len(fractions) > 1 and all(_is_fraction(label) or label.isdecimal() for label in found):
        raise LgpError(
            f"{table.file}: the labels are numbers with fractions ({', '.join(fractions[:SHOWN])}), as of a "
            "regression: lgp tells classes apart, give class names or whole numbers"
        )
    for mark in "|;,":
        several = sorted(label for label in found if mark in label and set(map(str.strip, label.split(mark))) <= found)
        if several:
            raise LgpError(
                f"{table.file}: {several[0]!r} names several classes: multi-label images are not supported, give one "
                "class each"
            )


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except (ValueError, OverflowError):
        return False


def table_source(table: Table, root: Path, complete: bool = False) -> Offers:
    """Open the images that a table names. Paths start at `root`, and lead to no file outside it.

    Rows whose file does not exist are listed as skipped. If the table should be `complete`, they are images that
    cannot be read, of which `data.max_unreadable_share` allows few.
    """
    listing = Listing()
    places: list[Path] = []
    seen: dict[str, int] = {}
    for row, path in enumerate(table.paths):
        file = inside(root, root, path)
        reason = _reason_against(path, file)
        if path in seen:
            _check_same_label(table, seen[path], row)
            reason = f"named before, in {table.places[seen[path]]}"
        missing = complete and reason == MISSING
        if file is None or (reason and not missing):
            listing.skipped.append(Skipped(table.said(row), reason))
            continue
        seen[path] = row
        state = MISSING if missing else state_of(file)
        listing.add(printable(path), table.splits[row], table.labels[row], table.groups[row], state)
        places.append(file)
    return listing.offers(partial(_reads, places))


def _reason_against(path: str, file: Path | None) -> str:
    """Return why a row's file cannot be taken, nothing where it can."""
    if not path:
        return "a row without a path"
    if file is None:
        return "a path out of the folder of the table: set `root` to the folder that holds all images"
    try:
        return "" if stat.S_ISREG(file.stat().st_mode) else "not a file"
    except FileNotFoundError:
        return MISSING
    except (OSError, ValueError) as e:
        return f"cannot be read: {getattr(e, 'strerror', None) or e}"


def _check_same_label(table: Table, first: int, second: int) -> None:
    one, other = table.labels[first], table.labels[second]
    if one is not None and other is not None and one != other:
        raise LgpError(
            f"{table.file}: {table.paths[second]} is {one!r} in {table.places[first]} and {other!r} in "
            f"{table.places[second]}: an image has one class, remove one of the rows"
        )


def _reads(places: Sequence[Path], positions: Sequence[int]) -> Iterator[Read]:
    return (partial(read_file, str(places[i])) for i in positions)


class ImagesByName:
    """Finds images by their path, or by the end of it at a folder's boundary."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = [unicodedata.normalize("NFC", path) for path in paths]
        self._exact = {path: i for i, path in enumerate(self.paths)}
        self._by_file: dict[str, list[int]] = {}
        for i, path in enumerate(self.paths):
            self._by_file.setdefault(path.rpartition("/")[2], []).append(i)

    def find(self, name: str) -> list[int]:
        """Return the images that a name fits."""
        if name in self._exact:
            return [self._exact[name]]
        of_file = self._by_file.get(name.rpartition("/")[2], [])
        # a table may also say more folders than the source's own paths have
        return [
            i for i in of_file if f"/{self.paths[i]}".endswith(f"/{name}") or f"/{name}".endswith(f"/{self.paths[i]}")
        ]


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
    images = ImagesByName(offers.paths)
    labels, splits, groups = list(offers.labels), list(offers.splits), list(offers.groups)
    named: list[int | None] = []
    seen: dict[int, int] = {}
    for row, path in enumerate(table.paths):
        found = images.find(f"{below}/{path}" if below else path) if path else []
        if len(found) > 1:
            raise LgpError(
                f"{table.file}: {table.places[row]} names {path}, which fits {len(found)} images "
                f"({', '.join(offers.paths[i] for i in found[:SHOWN])}): give more of its path"
            )
        named.append(found[0] if found else None)
        for image in found:
            if image in seen:
                _check_same_label(table, seen[image], row)
            seen[image] = row
            if (label := table.labels[row]) is not None:
                labels[image] = _class_of(offers, label, table, row)
            if (word := table.splits[row]) is not None:
                splits[image] = SPLITS[word]
            groups[image] = table.groups[row] or groups[image]
    new = natural_order(label for label in labels if label is not None and label not in offers.classes)
    return replace(offers, labels=labels, splits=splits, groups=groups, classes=[*offers.classes, *new]), named


def listed(offers: Offers, named: Sequence[int | None], table: Table) -> Offers:
    """Return images with the rows that name none of them listed as skipped."""
    unknown = [
        Skipped(table.said(row), "names no image of the source") for row, image in enumerate(named) if image is None
    ]
    return replace(offers, skipped=[*offers.skipped, *unknown])


def _class_of(offers: Offers, label: str, table: Table, row: int) -> str:
    """Return a class by its name, or by its number where the source declares an order."""
    if label in offers.classes or not (offers.declared and label.isdecimal()):
        return label
    if int(label) >= len(offers.classes):
        raise LgpError(
            f"{table.file}: {table.places[row]} has the label {label}, but the source has {len(offers.classes)} "
            f"classes, 0 to {len(offers.classes) - 1}: mend the label, or give class names"
        )
    return offers.classes[int(label)]
