"""What a cell, a word or a name means, whatever layout it stands in; and tables of text as rows."""

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from lgp.data.sources.offers import SPLITS, USUAL, Columns
from lgp.errors import LgpError

CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "__macosx", "$recycle.bin", "lost+found"}
WHOLE = re.compile(r"-?\d+\.0+")
DELIMITERS = ",;\t"


def rows_of(name: str, text: str) -> list[dict[str, Any]]:
    """Return the rows of a table: JSON lines or a JSON list by its name, else CSV with any usual delimiter.

    Raises:
        ValueError: a row is no object of names and values.
        csv.Error: the text is no CSV.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a row is no object of names and values")
        return rows
    delimiter = "\t" if suffix == ".tsv" else max(DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return [row for row in reader if any(row.values())]


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
    if by_chance and not {(plain_text(value) or "").lower() for value in values} <= {"", *SPLITS}:
        return [None] * len(values)
    return [split_of_cell(value, where(row)) for row, value in enumerate(values)]


def is_clutter(path: str) -> bool:
    """Return whether a relative path with `/` is of an operating system or viewer, or hidden."""
    return any(part.startswith(".") or part.lower() in CLUTTER for part in path.split("/"))


def printable(name: str) -> str:
    """Return a file's name as text that can be encoded. Bytes that are not UTF-8 are written as hexadecimal numbers."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
