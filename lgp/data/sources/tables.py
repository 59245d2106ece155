"""Tables with an image in each row: Parquet and Arrow files, in Hugging Face's layouts and others."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lgp.data.sources.cells import (
    class_name,
    column_of,
    is_clutter,
    note_on_columns,
    printable,
    split_word,
    split_words,
)
from lgp.data.sources.image_cells import inside, read_of, state_of
from lgp.data.sources.listing import LISTS, Listing
from lgp.data.sources.offers import SPLITS, UNLABELED, Columns, Offers, Read, Skipped
from lgp.data.sources.table_files import TableFile, open_table
from lgp.errors import LgpError, one_line

STATE, INFO, DICT = "state.json", "dataset_info.json", "dataset_dict.json"  # files of `save_to_disk`


class _Table(NamedTuple):
    """A table that holds images.

    Attributes:
        file: the opened file.
        name: its identity within the source.
        word: the word of `SPLITS` in its name, None without one.
        found: the columns it has.
        names: the class names that it declares, maybe none.
        by_path: the column of the images' paths, None where the table holds the images themselves.
    """

    file: TableFile
    name: str
    word: str | None
    found: Columns
    names: list[str]
    by_path: str | None


def parquet_source(root: Path, files: list[Path], columns: Columns) -> Offers:
    """List Parquet files whose rows hold images: Hugging Face's image layout, or plain bytes, or paths.

    The split of a row is in a column, else the first known word of the file's name (`train-00000-of-00004.parquet`),
    else of the folders that hold it, else it is train. Class names are in the schema's metadata under `huggingface`.
    Files that differ in their names, or in the order of them, are united by name. Without names, the labels are the
    names.

    Args:
        root: the source: a folder, or the only file.
        files: the Parquet files, in order.
        columns: given names of columns.

    Raises:
        LgpError: a file is not Parquet; no file has a column of images; the folders are several configurations; a label
            is not of one class.
    """
    folder = root if root.is_dir() else root.parent
    listing = Listing()
    visible = _visible(folder, files, listing)
    _refuse_configurations(folder, visible)
    opened = [(open_table(file), file.relative_to(folder).as_posix(), _word_of(folder, file)) for file in visible]
    return _offers(folder, opened, columns, listing, {})


def arrow_source(root: Path, columns: Columns) -> Offers:
    """List a folder that `datasets` wrote by `save_to_disk`, or an `.arrow` file, or a folder of such files.

    The splits of a `DatasetDict` are its folders. Otherwise they are found as in `parquet_source`.

    Raises:
        LgpError: as `parquet_source`, or a file that `state.json` names is missing.
    """
    folder = root if root.is_dir() else root.parent
    listing = Listing()
    if (folder / DICT).exists() and root.is_dir():
        saved = [folder / name for name in _texts(_json(folder / DICT).get("splits"))]
    else:
        saved = [root]
    files = [file for part in saved for file in _arrow_files(part)]
    others = sorted(set(folder.rglob("*.arrow")) - set(files)) if root.is_dir() else []
    hidden = Listing()
    for file in _visible(folder, others, hidden):
        listing.skipped.append(Skipped(_name(folder, file), f"not named in {STATE} or {DICT}"))
    listing.clutter.extend(hidden.clutter)
    visible = _visible(folder, files, listing)
    opened = [(open_table(file), file.relative_to(folder).as_posix(), _word_of(folder, file)) for file in visible]
    features = {file: _json(file.parent / INFO).get("features") for file in visible}
    return _offers(folder, opened, columns, listing, features)


def _arrow_files(part: Path) -> list[Path]:
    """Return the files that `state.json` of a folder names, in its order, else all of them."""
    if not part.is_dir():
        return [part]
    entries = _json(part / STATE).get("_data_files")
    names = _texts([e.get("filename") for e in entries if isinstance(e, dict)] if isinstance(entries, list) else [])
    if not names:
        return sorted(part.rglob("*.arrow"))
    missing = next((name for name in names if Path(name).name != name or not (part / name).is_file()), None)
    if missing:
        raise LgpError(f"{part / STATE} names the file {missing}, which {part} lacks: copy the whole folder again")
    return [part / name for name in names]


def hub_source(name: str, columns: Columns) -> Offers:
    """List a data set of the Hugging Face hub, which the library `datasets` downloads once: NAME or NAME:CONFIGURATION.

    Raises:
        LgpError: the library or the network is missing, there is no such data set, or it has several configurations.
    """
    try:
        import datasets
    except ImportError:
        raise LgpError(f"hf:{name} needs the library `datasets`: pip install 'lgp[hub]'") from None
    dataset, _, configuration = name.partition(":")
    try:
        loaded = datasets.load_dataset(dataset, configuration or None)
    except Exception as e:  # noqa: BLE001 - the hub's client raises errors of several libraries
        raise LgpError(
            f"hf:{name} cannot be loaded: {one_line(e)}; check the name (hf:NAME or hf:NAME:CONFIGURATION), the "
            "network and, for a data set that asks for it, `hf auth login`"
        ) from None
    opened = [
        (open_table(Path(file["filename"])), f"{split}/{Path(file['filename']).name}", split_word(split))
        for split, part in loaded.items()
        for file in part.cache_files
    ]
    return _offers(Path(datasets.config.HF_CACHE_HOME), opened, columns, Listing(), {})


def is_image_table(path: Path, columns: Columns) -> bool:
    """Return whether a Parquet or Arrow file has images in its rows: bytes, pixels, or paths of files that exist.

    `metadata.parquet` and `labels.parquet` describe the images of a folder, and are no tables of images, unless they
    hold them.

    Raises:
        LgpError: the file cannot be read as a table.
    """
    import pyarrow as pa

    file = open_table(path)
    found = _found_columns(file, columns)
    if found.image is None:
        return False
    if not _is_text(file.schema.field(found.image).type):
        return True
    if path.name.lower() in LISTS:
        return False
    if columns.image is not None:
        return True
    if file.rows == 0:
        return False
    first = file.columns([found.image])[found.image].slice(0, 64).drop_null()
    values = first.cast(pa.string()).to_pylist()
    return bool(values) and (path.parent / values[0]).is_file()


def holds_paths(path: Path, columns: Columns) -> bool:
    """Return whether the images of a table are text, which names them. Raise `LgpError` if it cannot be read."""
    file = open_table(path)
    image = _found_columns(file, columns).image
    return image is not None and _is_text(file.schema.field(image).type)


def _visible(folder: Path, files: Iterable[Path], listing: Listing) -> list[Path]:
    """Return the files that are not clutter; note the others."""
    visible = []
    for file in files:
        if is_clutter(file.relative_to(folder).as_posix()):
            listing.clutter.append(Skipped(_name(folder, file), "hidden"))
        else:
            visible.append(file)
    return visible


def _name(folder: Path, file: Path) -> str:
    return printable(file.relative_to(folder).as_posix())


def _word_of(folder: Path, file: Path) -> str | None:
    """Return the word of the split: of the file's name, else of the nearest folder that has one."""
    relative = file.relative_to(folder)
    return next(filter(None, map(split_word, (relative.stem, *reversed(relative.parts[:-1])))), None)


def _refuse_configurations(folder: Path, files: list[Path]) -> None:
    """Refuse folders of the hub that hold the same split in several configurations: other images, or other labels."""
    of_split: dict[str, set[str]] = {}
    for file in files:
        parts = file.relative_to(folder).parts[:-1]
        if (word := _word_of(folder, file)) is not None:
            before = [i for i, part in enumerate(parts) if split_word(part)]
            of_split.setdefault(SPLITS[word], set()).add("/".join(parts[: before[-1]] if before else parts))
    several = next((sorted(found) for found in of_split.values() if len(found) > 1), None)
    if several:
        raise LgpError(
            f"{folder} holds the same split in the folders {', '.join(name or '.' for name in several)}: are these "
            f"several configurations? Give one of them as the source, such as {folder / several[-1]}"
        )


def _offers(
    root: Path,
    opened: list[tuple[TableFile, str, str | None]],
    columns: Columns,
    listing: Listing,
    features: dict[Path, object],
) -> Offers:
    """List the rows of opened tables, each with its name and the word of its split.

    Args:
        root: no image that a table names by path is read outside it.
        opened: the tables.
        columns: given names of columns.
        listing: what was left out so far.
        features: what other files say about a table's columns, as `datasets` writes it.
    """
    tables = []
    for file, name, word in opened:
        found = _found_columns(file, columns)
        if found.image is None:
            reason = f"without a column of images; its columns are {', '.join(file.schema.names)}"
            listing.skipped.append(Skipped(printable(name), reason))
            continue
        names = _declared(file.schema, found.label) or _names_in(features.get(file.path), found.label)
        tables.append(_Table(file, name, word, found, names, _path_column(file, found.image)))
    _check_given(columns, opened)
    if not tables:
        raise LgpError(f"{root} has no table with images: {_why(listing)}; name the column of images")
    rows, of_table = [], []
    for number, table in enumerate(tables):
        kept = _list_rows(root, table, _names_for(table, tables), columns, listing)
        rows.append(kept)
        of_table.append(np.full(len(kept), number))
    reads = partial(_reads, root, tables, np.concatenate(of_table), np.concatenate(rows))
    listing.notes += _notes_on_columns(root, tables)
    return listing.offers(reads, (name for table in tables for name in table.names))


def _notes_on_columns(root: Path, tables: list[_Table]) -> list[str]:
    """Return what is to be told of columns that no table is read for. Most tables of a source have the same."""
    name = tables[0].name if len(tables) == 1 else f"{len(tables)} tables of {root.name}"
    roles = {role: [t.found[i] for t in tables if t.found[i] is not None] for i, role in enumerate(Columns._fields)}
    read = {role: columns[0] if columns else None for role, columns in roles.items()}
    also_read = set(chain.from_iterable(roles.values())) - set(read.values()) | {table.by_path for table in tables}
    present = dict.fromkeys(chain.from_iterable(table.file.schema.names for table in tables))
    return note_on_columns(name, [column for column in present if column not in also_read], read)


def _why(listing: Listing) -> str:
    left_out = [*listing.skipped, *listing.clutter][:3]
    return "; ".join(f"{path} is {reason}" for path, reason in left_out) or "it is empty"


def _check_given(columns: Columns, opened: list[tuple[TableFile, str, str | None]]) -> None:
    """Refuse a given column that no table has."""
    present = list(dict.fromkeys(name for file, _, _ in opened for name in file.schema.names))
    for role, given in columns._asdict().items():
        if given is not None and opened and given not in present:
            raise LgpError(f"no table has the column {given!r}, given for {role}: there are {', '.join(present)}")


def _found_columns(file: TableFile, columns: Columns) -> Columns:
    """Return the names of the columns that a table has.

    Raises:
        LgpError: two columns have the same name, or the labels are not of one class.
    """
    schema = file.schema
    unique = [name for name in schema.names if schema.names.count(name) == 1]
    images = [name for name in unique if _may_hold_images(schema.field(name).type)]
    found = Columns(
        column_of(images, columns, "image"),
        column_of(unique, columns, "label"),
        column_of(unique, columns, "split"),
        column_of(unique, columns, "group"),
    )
    twice = [name for name in schema.names if name not in unique]
    for role in Columns._fields:
        name = column_of(schema.names, columns, role)
        if name in twice:
            raise LgpError(f"{file.path} has several columns {name!r}: rename all but one, or name another as {role}")
    return found


def _may_hold_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return bool({"bytes", "path"} & {kind.field(i).name for i in range(kind.num_fields)})
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    binaries = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return _is_text(kind) or any(test(kind) for test in (*lists, *binaries))


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view))


def _path_column(file: TableFile, image: str) -> str | None:
    """Return the column of paths if the images are not in the table itself."""
    import pyarrow.types as types

    kind = file.schema.field(image).type
    if not types.is_struct(kind):
        return image if _is_text(kind) else None
    fields = {kind.field(i).name for i in range(kind.num_fields)}
    return f"{image}.path" if "path" in fields and ("bytes" not in fields or file.lacks(image, "bytes")) else None


def _declared(schema: Any, label: str | None) -> list[str]:
    """Return the class names in a schema's metadata. Metadata that is damaged, or of another kind, has none."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return []
    info = metadata.get("info") if isinstance(metadata, dict) else None
    return _names_in(info.get("features") if isinstance(info, dict) else None, label)


def _names_in(features: object, label: str | None) -> list[str]:
    feature = features.get(label) if isinstance(features, dict) else None
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _names_for(table: _Table, tables: list[_Table]) -> list[str]:
    """Return the class names that a table's numbers stand for: its own, else those on which all others agree."""
    import pyarrow.types as types

    declared = {tuple(other.names) for other in tables if other.names}
    if table.names or not declared or table.found.label is None:
        return table.names
    if not types.is_integer(table.file.schema.field(table.found.label).type):
        return []
    if len(declared) > 1:
        raise LgpError(
            f"{table.file.path} numbers its classes and does not name them, and the other files name them in different "
            "orders: write it again with its class names, or with text as labels"
        )
    return list(next(iter(declared)))


def _list_rows(root: Path, table: _Table, names: list[str], columns: Columns, listing: Listing) -> np.ndarray:
    """List the rows of a table. Return the numbers of those that are images."""
    state = state_of(table.file.path)
    cells = _cells(table)
    words = _words(table, cells.get("split"), columns)
    labels = _labels(table, cells.get("label"), words, names)
    groups = cells.get("group", [None] * table.file.rows)
    kept = []
    for row, (word, label, group) in enumerate(zip(words, labels, groups, strict=True)):
        path, of_row = f"{printable(table.name)}#{row}", f"{state}-{row}"
        if "path" in cells and cells["path"][row] is not None:
            file = inside(root, table.file.path.parent, cells["path"][row])
            if file is None:
                listing.skipped.append(Skipped(path, f"its path {cells['path'][row]!r} leads out of the source"))
                continue
            of_row = state_of(file)
        listing.add(path, word, label, group, of_row)
        kept.append(row)
    return np.array(kept, dtype=np.int64)


def _cells(table: _Table) -> dict[str, list[Any]]:
    """Read the columns that say something of an image: role (label, split, group, path) → a value per row."""
    import pyarrow as pa

    roles = {**table.found._asdict(), "path": table.by_path}
    del roles["image"]
    names = {role: name for role, name in roles.items() if name is not None}
    try:
        read = table.file.columns(list(dict.fromkeys(names.values()))) if names else None
    except (pa.ArrowException, OSError) as e:
        raise LgpError(f"{table.file.path} cannot be read: {one_line(e)}; mend or remove it") from None
    return {role: _values(read, name) for role, name in names.items()}


def _values(read: Any, name: str) -> list[Any]:
    if name in read.column_names:
        return read[name].to_pylist()
    whole, _, leaf = name.rpartition(".")
    return [None if value is None else value[leaf] for value in read[whole].to_pylist()]


def _words(table: _Table, values: list[Any] | None, columns: Columns) -> list[str | None]:
    """Return the word of each row's split: of its cell, else of the table's name."""
    if values is None:
        return [table.word] * table.file.rows
    words = split_words(values, table.found.split, columns, lambda row: f"{table.file.path}: row {row}")
    return [word or table.word for word in words]


def _labels(table: _Table, values: list[Any] | None, words: list[str | None], names: list[str]) -> list[str | None]:
    """Return the class name of each row, None for unlabelled ones, whatever their labels are."""
    if values is None:
        return [None] * table.file.rows
    meant: dict[object, str | None] = {}
    labels: list[str | None] = []
    for row, (value, word) in enumerate(zip(values, words, strict=True)):
        if word in UNLABELED:
            labels.append(None)
            continue
        if isinstance(value, list | dict) or value not in meant:
            meant[value] = _named(value, names, f"{table.file.path}: row {row}")
        labels.append(meant[value])
    return labels


def _named(value: object, names: list[str], where: str) -> str | None:
    label = class_name(value, where)
    if label is None or isinstance(value, str | bytes) or not names:
        return label
    if not 0 <= int(label) < len(names):
        raise LgpError(f"{where} has the label {label}, but the class names are 0 to {len(names) - 1}: mend the row")
    return names[int(label)]


def _reads(
    root: Path, tables: list[_Table], of_table: np.ndarray, rows: np.ndarray, positions: Sequence[int]
) -> Iterator[Read]:
    """Stream the images at ascending positions: `of_table` and `rows` say where each is."""
    chosen = np.asarray(positions, dtype=np.int64)
    for number in np.unique(of_table[chosen]).tolist():
        table = tables[number]
        wanted = rows[chosen[of_table[chosen] == number]]
        for value in table.file.values(table.found.image or "", wanted):
            yield read_of(value, root, table.file.path.parent)


def _json(path: Path) -> dict[str, Any]:
    """Read a file that describes saved data. One that is absent, damaged or of another kind describes nothing."""
    try:
        read = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _texts(values: object) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
