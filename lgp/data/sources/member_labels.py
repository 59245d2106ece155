"""What an archive says of its images: files beside them (WebDataset), lists of them, and the names of their folders."""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lgp.data.sources.listing import class_name, column_of, group_name, one_line, split_of_cell
from lgp.data.sources.offers import SPLITS, Columns
from lgp.errors import LgpError

MANIFESTS = ("labels.csv", "metadata.csv", "labels.jsonl", "metadata.jsonl")
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
        text = data.decode("utf-8-sig").strip()
        if name.lower().endswith(".cls"):
            return Said(class_name(text, name), labels=True)
        fields = json.loads(text)
    except ValueError as e:
        raise LgpError(f"{name} cannot be read: {one_line(e)}; mend or remove it") from None
    said = _said(fields, columns, name) if isinstance(fields, dict) else Said()
    return None if said == Said() else said


def in_manifest(name: str, folder: str, data: bytes, columns: Columns) -> Iterator[tuple[int, str, Said]]:
    """Iterate over the rows of a list of images: number, path in the archive, and what the row says.

    A list without a column of paths has no rows.

    Args:
        name: of the list, for messages.
        folder: where its paths start.
        data: the file: CSV with a line of column names, or JSON lines, by its name.
        columns: given names of columns.

    Raises:
        LgpError: it cannot be read, or has a label that is not of one class.
    """
    try:
        text = data.decode("utf-8-sig")
        rows = _json_rows(text) if name.endswith(".jsonl") else _csv_rows(text)
    except (ValueError, csv.Error) as e:
        raise LgpError(f"{name} cannot be read: {one_line(e)}; mend or remove it") from None
    for number, row in enumerate(rows):
        image = column_of(list(row), columns, "image")
        if image is not None:
            path = posixpath.normpath(posixpath.join(folder, str(row[image]).replace("\\", "/")))
            yield number, path, _said(row, columns, f"{name}: row {number}")


def _csv_rows(text: str) -> list[dict[str, Any]]:
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))


def _json_rows(text: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no object of names and values")
    return rows


def _said(row: dict[str, Any], columns: Columns, where: str) -> Said:
    label, split, group = (column_of(list(row), columns, role) for role in ("label", "split", "group"))
    of_group = row[group] if group else None
    return Said(
        class_name(row[label], where) if label else None,
        split_of_cell(row[split], where) if split and (split == "split" or columns.split) else None,
        group_name(of_group),
        labels=label is not None,
    )


def by_folders(paths: Sequence[str]) -> list[Said]:
    """Return what the folders of images say: `train/CLASS/x.jpg`, `CLASS/x.jpg`, whatever folders are above all.

    A folder `train` beside other folders that hold images is a class, if no folder holds classes. One folder that holds
    every image is no class.
    """
    folders = [tuple(path.split("/")[:-1]) for path in paths]
    while folders and _is_above_all(folders):
        folders = [parts[1:] for parts in folders]
    top = {parts[0] for parts in folders if parts}
    flat = all(len(parts) <= 1 for parts in folders)
    has_splits = any(name.lower() in SPLITS for name in top) and not (flat and not _are_splits(top))
    if not has_splits and flat and len(top) == 1 and all(folders):
        return [Said()] * len(folders)
    return [_of_folders(parts, has_splits) for parts in folders]


def _is_above_all(folders: Sequence[tuple[str, ...]]) -> bool:
    """Return whether one folder, which is no split, holds nothing but folders, and these hold all images."""
    first = folders[0][:1]
    return bool(first) and not _are_splits(first) and all(len(p) > 1 and p[:1] == first for p in folders)


def _are_splits(names: set[str] | tuple[str, ...]) -> bool:
    return all(name.lower() in SPLITS for name in names)


def _of_folders(parts: tuple[str, ...], has_splits: bool) -> Said:
    if has_splits and parts and parts[0].lower() in SPLITS:
        return Said(parts[1] if len(parts) > 1 else None, parts[0].lower(), labels=True)
    return Said(parts[0] if parts else None, labels=True)
