"""What a cell, a word or a name means, whatever layout it stands in; and tables of text as rows."""

import codecs
import csv
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from lgp.data.sources.offers import SPLITS, USUAL, Columns
from lgp.errors import LgpError

CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin", "lost+found"}
SAID = {"", *SPLITS}
WHOLE = re.compile(r"-?\d+\.0+")
DELIMITERS = ",;\t"
MOST_NAMED = 8  # columns in a message
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")


class Cells(NamedTuple):
    """The cells of a table as they stand in its file: a list per column, and the number of each row, for messages."""

    columns: dict[str, list[Any]]
    numbers: Sequence[int]


def cells_of(name: str, data: bytes) -> Cells:
    """Return the cells of a table: Parquet, JSON lines or a JSON list by its name, else CSV with any usual delimiter.

    Raises:
        ValueError: the file is damaged or not UTF-8, a row is no object of names and values, or does not fit the names
            of the columns.
        csv.Error: the text is no CSV.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".parquet":
        return _of_parquet(data)
    text = text_of(data)
    if suffix in JSON_ENDINGS:
        numbers, rows = _objects(text)
        names = dict.fromkeys(key for row in rows for key in row)
        return Cells({key: [row.get(key) for row in rows] for key in names}, numbers)
    first = text.lstrip("\r\n").partition("\n")[0]
    return _of_text(text, "\t" if suffix == ".tsv" else max(DELIMITERS, key=first.count))


def rows_of(name: str, data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a table, which `cells_of` reads. A row of JSON has the names that it gives itself."""
    if PurePosixPath(name).suffix.lower() in JSON_ENDINGS:
        return _objects(text_of(data))[1]
    columns = cells_of(name, data).columns
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def text_of(data: bytes) -> str:
    """Return the content of a text file. It is UTF-8, with or without a mark at its beginning.

    Raises:
        ValueError: it is not. The message says where, and how to convert the file.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        code = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin1"
        raise ValueError(
            f"it is not UTF-8 (byte 0x{data[e.start]:02x} in line {line}); convert it: "
            f"iconv -f {code} -t utf-8 OLD > NEW"
        ) from None


def _of_parquet(data: bytes) -> Cells:
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    return Cells({name: table[name].to_pylist() for name in table.column_names}, range(table.num_rows))


def _objects(text: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the objects of a JSON list, or those of the lines, with their numbers from 1."""
    if text.lstrip().startswith("["):
        entries = list(enumerate(json.loads(text), 1))
    else:  # str.splitlines would also break at characters that JSON allows in a text
        lines = enumerate(io.StringIO(text, newline=None), 1)
        entries = [(number, json.loads(line)) for number, line in lines if line.strip()]
    if not all(isinstance(row, dict) for _, row in entries):
        raise ValueError("a row is no object of names and values")
    return [number for number, _ in entries], [row for _, row in entries]


def _of_text(text: str, delimiter: str) -> Cells:
    reader = enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1)
    names = next((row for _, row in reader if any(row)), [])
    twice = next((name for name, count in Counter(names).items() if count > 1 and name.strip()), None)
    if twice is not None:
        raise ValueError(f"two columns are called {twice!r}")
    columns: list[list[str | None]] = [[] for _ in names]
    numbers = []
    for number, row in reader:
        if not any(row):
            continue
        if len(row) != len(names):
            _refuse_more_cells(row, len(names), number, delimiter)
        numbers.append(number)
        for column, cell in zip_longest(columns, row[: len(names)]):
            column.append(cell)
    return Cells(dict(zip(names, columns, strict=True)), numbers)


def _refuse_more_cells(row: Sequence[str], width: int, number: int, delimiter: str) -> None:
    if any(row[width:]):
        raise ValueError(
            f"row {number} has {len(row)} cells, but there are {width} columns: put a text that has {delimiter!r} in "
            "quotes, and give one label an image"
        )


def column_of(present: Sequence[str], columns: Columns, role: str) -> str | None:
    """Return the name of the column for a role: the given one, else the first usual one, None if it is not present.

    Args:
        present: names of the columns that the table has. Usual names count in any case.
        columns: the given names.
        role: image, label, split or group.
    """
    given = getattr(columns, role)
    if given is not None:
        return given if given in present else None
    by_name = {str(name).strip().lower(): name for name in reversed(present)}
    return next((by_name[name] for name in USUAL[role] if name in by_name), None)


def note_on_columns(name: str, present: Sequence[str], read: Mapping[str, str | None]) -> list[str]:
    """Return a line that says what the columns of a table were read as, if one of them was not read.

    Args:
        name: of the table.
        present: names of its columns.
        read: role → name of the column, None without one.
    """
    unread = [str(column) for column in present if column not in read.values() and str(column).strip()]
    if not unread:
        return []
    roles = ", ".join(f"{role} from {column!r}" for role, column in read.items() if column is not None)
    missing = [role for role in ("label", "split", "group") if read.get(role) is None]
    hint = f"; data.columns: {{{missing[-1]}: COLUMN}} reads one" if missing else ""
    without = f"; no {' and no '.join(missing)}" if missing else ""
    more = f" and {len(unread) - MOST_NAMED} more" if len(unread) > MOST_NAMED else ""
    return [f"{name}: {roles}{without}; not read: {', '.join(unread[:MOST_NAMED])}{more}{hint}"]


def plain_text(value: object) -> str | None:
    """Return a cell as text, of one form where it looks the same (Unicode's NFC). None for nothing, NaN and blanks."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)
    return unicodedata.normalize("NFC", text.strip()) or None


def class_name(value: object, where: str) -> str | None:
    """Return the class name that a cell holds, None for a missing value, a blank text or -1. `3.0` is the class 3.

    Raises:
        LgpError: the cell holds several labels, a number that is not whole, or no label at all. `where` names the cell.
    """
    if isinstance(value, list | tuple | dict):
        raise LgpError(f"{where} has the label {_short(value)}: several labels an image are not supported; give one")
    if not isinstance(value, str | bytes | int | float | None):
        raise LgpError(f"{where} has a label of type {type(value).__name__}: give text or whole numbers")
    if isinstance(value, float) and not math.isnan(value) and not value.is_integer():
        raise LgpError(f"{where} has the label {value}: a number that is not whole names no class; give classes")
    text = plain_text(int(value) if isinstance(value, float) and not math.isnan(value) else value)
    if text and WHOLE.fullmatch(text):
        text = text.partition(".")[0]
    return None if text == "-1" else text


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:60]}…"


def split_word(text: str) -> str | None:
    """Return the first word of a name that names a split (`train-00000-of-00004`), lower case, None without one."""
    return next((word for word in re.split(r"[^a-z]+", text.lower()) if word in SPLITS), None)


def split_of_cell(value: object, where: str) -> str | None:
    """Return the word of `SPLITS` that a cell holds, None for a missing value or a blank text.

    Raises:
        LgpError: the cell holds another word.
    """
    word = (plain_text(value) or "").lower()
    if word and word not in SPLITS:
        raise LgpError(f"{where} has the split {value!r}: valid are {', '.join(SPLITS)}")
    return word or None


def split_words(
    values: Sequence[object], name: str | None, columns: Columns, where: Callable[[int], str]
) -> list[str | None]:
    """Return the word of each row's split. A column that is called `part` or `set` and has other words says nothing.

    Args:
        values: of the column, a value per row.
        name: of the column. None: there is none.
        columns: the given names.
        where: row → its place, for messages.

    Raises:
        LgpError: a column that is given, or called `split`, has another word.
    """
    by_chance = columns.split is None and str(name).strip().lower() != "split"
    if by_chance and not {(text or "").lower() for text in meanings(values, lambda v, _: plain_text(v))} <= SAID:
        return [None] * len(values)
    return meanings(values, lambda value, row: split_of_cell(value, where(row)))


def meanings(values: Sequence[Any], of: Callable[[Any, int], str | None]) -> list[str | None]:
    """Return what each cell of a column means. Equal texts mean the same: `of` sees them once, with the first row."""
    known: dict[str, str | None] = {}
    found = []
    for row, value in enumerate(values):
        if not isinstance(value, str):
            found.append(of(value, row))
            continue
        if value not in known:
            known[value] = of(value, row)
        found.append(known[value])
    return found


def is_clutter(path: str) -> bool:
    """Return whether a relative path with `/` is of an operating system or viewer, or hidden."""
    return path.startswith(".") or "/." in path or not CLUTTER.isdisjoint(path.lower().split("/"))


def printable(name: str) -> str:
    """Return a file's name as text that can be encoded. Bytes that are not UTF-8 are written as hexadecimal numbers."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
