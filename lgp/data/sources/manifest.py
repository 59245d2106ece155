"""A table that names images: CSV, TSV, JSON lines, or Parquet with paths.

It labels images of other sources, or opens its own.

A row has a path, and may have a label, a split and a group. A path starts at the folder of the table, or at `root`. It
never leaves that folder. An empty label means: without a label, as in a selection that nobody has filled in yet.
"""

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from lgp.data.sources.listing import group_name, printable
from lgp.data.sources.offers import SPLITS, USUAL, Columns, Offers, Read, Skipped, natural_order, read_file
from lgp.errors import LgpError

SHOWN = 3  # examples in a message
WHOLE = re.compile(r"-?\d+\.0+")


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


def read_table(file: Path, columns: Columns = Columns()) -> Table:
    """Read a table of images.

    Raises:
        LgpError: it cannot be read, has no column of paths, or has several labels or measured values for an image.
    """
    rows, first, header = _read(file)
    named = {key: _column(file, key, getattr(columns, key), header) for key in Columns._fields}
    if named["image"] is None:
        raise LgpError(
            f"{file} has the columns {', '.join(map(str, header)) or '(none)'}, none of them of paths: call one "
            f"`path`, or name it with data.columns: {{image: COLUMN}}"
        )
    values = {key: [row.get(column) if column else None for row in rows] for key, column in named.items()}
    table = Table(
        file,
        [unicodedata.normalize("NFC", str(value or "").strip().replace("\\", "/")) for value in values["image"]],
        [_label(file, value) for value in values["label"]],
        _splits(values["split"], named["split"], columns),
        [group_name(value) for value in values["group"]],
        [f"row {number}" for number in range(first, first + len(rows))],
    )
    _refuse_regression(table)
    return table


def known_columns(file: Path, columns: Columns) -> Columns:
    """Return those of the given names of columns that a table has. The usual names take the place of the others."""
    header = _read(file)[2] if any(columns) else []
    return Columns(*(name if name in header else None for name in columns))


def has_paths(file: Path, columns: Columns) -> bool:
    """Return whether a table has a column of paths. Raise `LgpError` if it cannot be read."""
    header = _read(file)[2]
    return columns.image in header if columns.image else _column(file, "image", None, header) is not None


def _read(file: Path) -> tuple[list[dict[Any, Any]], int, list[Any]]:
    """Return the rows, the number of the first, and the names of the columns."""
    try:
        rows, first = _rows_of(file)
    except (OSError, UnicodeError, csv.Error, ValueError) as e:
        raise LgpError(
            f"{file} cannot be read as a table ({' '.join(str(e).split())}): give CSV, TSV or JSON lines in UTF-8"
        ) from None
    return rows, first, list(dict.fromkeys(key for row in rows for key in row if key is not None))


def _rows_of(file: Path) -> tuple[list[dict[Any, Any]], int]:
    """Return the rows, and the number of the first."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(file).to_pylist(), 0
    text = file.read_text(encoding="utf-8-sig")
    if suffix in (".jsonl", ".ndjson", ".json"):
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a row is no object")
        return rows, 1
    delimiter = "\t" if suffix == ".tsv" else _delimiter(text.partition("\n")[0])
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return [row for row in reader if any(row.values())], 2


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _column(file: Path, key: str, given: str | None, header: Sequence[str]) -> str | None:
    if given is None:
        by_name = {str(name).strip().lower(): name for name in reversed(header)}
        return next((by_name[name] for name in USUAL[key] if name in by_name), None)
    if given not in header:
        raise LgpError(
            f"{file} has no column {given!r} (data.columns.{key}), only {', '.join(map(str, header))}: mend the name"
        )
    return given


def _text(value: Any) -> str | None:
    text = "" if value is None else unicodedata.normalize("NFC", str(value).strip())
    return text or None


def _splits(values: list[Any], name: str | None, columns: Columns) -> list[str | None]:
    """Return the words of splits. A column such as `part` or `set` that has other words says nothing."""
    words = [_text(value) for value in values]
    by_chance = columns.split is None and name is not None and name.strip().lower() != "split"
    if by_chance and any(word is not None and word.lower() not in SPLITS for word in words):
        return [None] * len(words)
    return words


def _label(file: Path, value: Any) -> str | None:
    """Return a class name. Whole numbers stand as `3`, also where a table has `3.0`. -1 is no label."""
    if isinstance(value, list | dict):
        raise LgpError(
            f"{file}: a label is {value!r}, several for one image: multi-label images are not supported, give one "
            "class each"
        )
    if isinstance(value, float) and math.isnan(value):
        return None
    text = _text(value)
    if text and WHOLE.fullmatch(text):
        text = text.partition(".")[0]
    return None if text == "-1" else text


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


def table_source(table: Table, root: Path) -> Offers:
    """Open the images that a table names. Paths start at `root`."""
    inside = root.resolve()
    kept: list[int] = []
    places: list[Path] = []
    states: list[str] = []
    skipped: list[Skipped] = []
    seen: dict[str, int] = {}
    for i, path in enumerate(table.paths):
        place, reason, state = _place(inside, root, path)
        if path in seen:
            _check_same_label(table, seen[path], i)
            reason = f"named before, in {table.places[seen[path]]}"
        if reason:
            skipped.append(Skipped(table.said(i), reason))
            continue
        seen[path] = i
        kept.append(i)
        places.append(place)
        states.append(state)
    labels = [table.labels[i] for i in kept]
    return Offers(
        [printable(table.paths[i]) for i in kept],
        [_split(table, i) for i in kept],
        labels,
        [table.groups[i] for i in kept],
        states,
        natural_order(label for label in labels if label is not None),
        partial(_reads, places),
        skipped,
    )


def _place(inside: Path, root: Path, path: str) -> tuple[Path, str, str]:
    """Return where a row's file is, why it cannot be taken, and its state."""
    place = root / path
    try:
        real = place.resolve()
        if not path:
            return place, "a row without a path", ""
        if (PurePosixPath(path).is_absolute() and not real.is_relative_to(inside)) or ".." in PurePosixPath(path).parts:
            return place, "a path out of the folder of the table: set `root` to the folder that holds all images", ""
        about = place.stat()
        if not place.is_file():
            return place, "not a file", ""
        return place, "", f"{about.st_size}:{about.st_mtime_ns}"
    except (OSError, ValueError, RuntimeError) as e:
        return (
            place,
            "no such file" if isinstance(e, FileNotFoundError) else f"cannot be read: {getattr(e, 'strerror', e)}",
            "",
        )


def _check_same_label(table: Table, first: int, second: int) -> None:
    one, other = table.labels[first], table.labels[second]
    if one is not None and other is not None and one != other:
        raise LgpError(
            f"{table.file}: {table.paths[second]} is {one!r} in {table.places[first]} and {other!r} in "
            f"{table.places[second]}: an image has one class, remove one of the rows"
        )


def _split(table: Table, row: int) -> str:
    given = table.splits[row]
    if given is None:
        return "train"
    if given.lower() not in SPLITS:
        raise LgpError(f"{table.file}: {table.places[row]} has the split {given!r}: valid are {', '.join(SPLITS)}")
    return SPLITS[given.lower()]


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
        name = name.removeprefix("./")
        of_file = self._by_file.get(name.rpartition("/")[2], [])
        # a table may also say more folders than the source's own paths have
        return [
            i for i in of_file if f"/{self.paths[i]}".endswith(f"/{name}") or f"/{name}".endswith(f"/{self.paths[i]}")
        ]


def label_offers(offers: Offers, table: Table, below: str = "", strict: bool = False) -> Offers:
    """Return the same images with the labels, splits and groups that a table gives. Rows without a label change none.

    Args:
        offers: images of other sources.
        table: the rows.
        below: the folder that the table lies in, within the source.
        strict: refuse rows that name no image. Otherwise they are listed as skipped.

    Raises:
        LgpError: a row fits several images, is of another class than a row before, or names a class by a number that
            the source does not have; with `strict` also a row that names no image.
    """
    images = ImagesByName(offers.paths)
    labels, splits, groups = list(offers.labels), list(offers.splits), list(offers.groups)
    unknown: list[Skipped] = []
    seen: dict[int, int] = {}
    for row, path in enumerate(table.paths):
        found = images.find(f"{below}/{path}" if below else path) if path else []
        if len(found) > 1:
            raise LgpError(
                f"{table.file}: {table.places[row]} names {path}, which fits {len(found)} images "
                f"({', '.join(offers.paths[i] for i in found[:SHOWN])}): give more of its path"
            )
        if not found:
            unknown.append(Skipped(table.said(row), "names no image of the source"))
            continue
        image = found[0]
        if image in seen:
            _check_same_label(table, seen[image], row)
        seen[image] = row
        if table.labels[row] is not None:
            labels[image] = _class_of(offers, str(table.labels[row]), table, row)
        if table.splits[row] is not None:
            splits[image] = _split(table, row)
        groups[image] = table.groups[row] or groups[image]
    if strict and unknown:
        few = ", ".join(skipped.path for skipped in unknown[:SHOWN])
        raise LgpError(
            f"{table.file}: {len(unknown)} of {len(table.paths)} rows name no image of data.source: {few}: mend the "
            "paths, which start at the source's folder"
        )
    given = natural_order(label for label in labels if label is not None and label not in offers.classes)
    return replace(
        offers,
        labels=labels,
        splits=splits,
        groups=groups,
        classes=[*offers.classes, *given] if offers.classes else given,
        skipped=[*offers.skipped, *unknown],
    )


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
