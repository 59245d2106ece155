"""What an archive says of its images: files beside them (WebDataset), and lists of them."""

import csv
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lgp.data.sources.cells import class_name, column_of, note_on_columns, plain_text, rows_of, split_of_cell, text_of
from lgp.data.sources.offers import Columns
from lgp.errors import LgpError, one_line

SIDECARS = (".cls", ".json")


class Said(NamedTuple):
    """What is said of an image.

    Attributes:
        label: class name, None for an image without a label.
        word: the word of its split, None where nothing is said.
        group: None where nothing is said.
        labels: whether anything is said of its label.
    """

    label: str | None = None
    word: str | None = None
    group: str | None = None
    labels: bool = False


def in_sidecar(name: str, data: bytes, columns: Columns) -> Said | None:
    """Return what a file beside an image says: the class in `0001.cls`, or the fields of `0001.json`. None for nothing.

    Raises:
        LgpError: it cannot be read, or has a label that is not of one class.
    """
    try:
        text = text_of(data).strip()
        if name.lower().endswith(".cls"):
            return Said(class_name(text, name), labels=True)
        fields = json.loads(text)
    except ValueError as e:
        raise LgpError(f"{name} cannot be read: {one_line(e)}; mend or remove it") from None
    said = _said(fields, columns, name) if isinstance(fields, dict) else Said()
    return None if said == Said() else said


def manifest_rows(name: str, data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a list of images: CSV with a line of column names, JSON lines or Parquet, by its name.

    Raises:
        LgpError: it cannot be read.
    """
    try:
        return rows_of(name, data)
    except (ValueError, RecursionError, csv.Error) as e:
        raise LgpError(f"{name} cannot be read: {one_line(e)}; mend or remove it") from None


def notes_on_manifest(name: str, rows: Sequence[dict[str, Any]], columns: Columns) -> list[str]:
    """Return what is to be told of columns that are not read. A list without a column of paths says nothing anyway."""
    present = list(dict.fromkeys(column for row in rows for column in row))
    read = {role: column_of(present, columns, role) for role in Columns._fields}
    return [] if read["image"] is None else note_on_columns(name, present, read)


def in_manifest(
    name: str, folder: str, rows: Sequence[dict[str, Any]], columns: Columns
) -> Iterator[tuple[int, str, Said]]:
    """Iterate over the rows of a list of images: number, path in the archive, and what the row says.

    A list without a column of paths has no rows.

    Args:
        name: of the list, for messages.
        folder: where its paths start.
        rows: as `manifest_rows` returns them.
        columns: given names of columns.

    Raises:
        LgpError: a label is not of one class.
    """
    for number, row in enumerate(rows):
        image = column_of(list(row), columns, "image")
        if image is not None:
            path = posixpath.normpath(posixpath.join(folder, str(row[image]).replace("\\", "/")))
            yield number, path, _said(row, columns, f"{name}: row {number}")


def _said(row: dict[str, Any], columns: Columns, where: str) -> Said:
    label, split, group = (column_of(list(row), columns, role) for role in ("label", "split", "group"))
    of_group = row[group] if group else None
    return Said(
        class_name(row[label], where) if label else None,
        split_of_cell(row[split], where) if split and (split == "split" or columns.split) else None,
        plain_text(of_group),
        labels=label is not None,
    )
