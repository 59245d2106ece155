"""From `data.source` to the images that it offers: find each layout, open it, and join what several sources have."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING

from lgp.data.sources.cells import is_clutter, printable, split_word
from lgp.data.sources.folder import folder_offers, single_image, walk_folder
from lgp.data.sources.manifest import (
    Table,
    label_offers,
    labels_any,
    leads_anywhere,
    listed,
    note_of,
    read_rows,
    read_table,
    table_of,
    table_source,
)
from lgp.data.sources.offers import SPLITS, UNLABELED, Columns, Offers, Read, Skipped
from lgp.data.sources.specs import DIGITS, TABLES, Source, Spec, columns_of, spec_of
from lgp.errors import LgpError, NoSource, without_credentials

if TYPE_CHECKING:
    from lgp.params.data import ColumnsParams

SUFFIXES = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet",
    ".arrow": "arrow", ".tar": "tar", ".tgz": "tar", ".gz": "tar", ".zip": "zip", ".npz": "npz",
}  # fmt: skip
LAYOUTS = (
    "a folder of images, a table of paths (.csv, .tsv, .jsonl), Parquet or Arrow of a Hugging Face data set, .tar or "
    ".zip archives, .npz, hf:NAME, torchvision:NAME, or digits"
)
DOWNLOADS = Path(".lgp") / "downloads"


def open_sources(
    sources: Sequence[Source], columns: "ColumnsParams | Columns | None" = None, tables: Sequence[str] = ()
) -> Offers:
    """Open all sources as one. A table behind other sources labels their images; its other rows are more images.

    Args:
        sources: the key `data.source`.
        columns: the key `data.columns`, for sources without columns of their own.
        tables: the key `data.labels`: tables that label images and add none.

    Raises:
        LgpError: a source does not exist, has no known layout, or contradicts itself.
    """
    usual = columns_of(columns)
    specs = [specified(source, usual) for source in sources]
    given = [spec.columns or usual for spec in specs]
    rows = [_table_of(spec, given[number], specs, number > 0) for number, spec in enumerate(specs)]
    opened: list[Offers] = []
    names: list[str] = []
    apart: list[Offers] = []  # each source by itself
    for number, (spec, table) in enumerate(zip(specs, rows, strict=True)):
        if table is not None and opened and spec.root is None:
            before, own = _labelled_by(table, _joined(opened, names))
            opened, names = [before], [""]
        elif table is not None:
            own = _of_table(table, spec, specs[number + 1 :])
        else:
            behind = zip(specs[number + 1 :], rows[number + 1 :], strict=True)
            labelling = [other for place, other in behind if other is not None and place.root is None]
            own = _of_its_name(_opened(spec, given[number], labelling), spec, specs)
        opened.append(own)
        names.append(_name(spec))
        apart.append(own)
    _refuse_files_of_two(apart, specs, rows)
    offers = _joined(opened, names)
    for file in tables:
        found = read_rows(_local(file))
        table = table_of(found, found.known(usual)).in_split(split_word(Path(file).name))
        offers = listed(*label_offers(offers, table), table)
    return replace(offers, notes=list(dict.fromkeys(offers.notes)))  # tables in several folders may say the same


def _labelled_by(table: Table, before: Offers) -> tuple[Offers, Offers]:
    """Label images by a table behind them. Return them, and the images that only the table names.

    A row that leads to no file is listed as skipped, if at least as many rows name images of other sources.
    """
    labelled, named = label_offers(before, table)
    rest = [row for row, image in enumerate(named) if image is None]
    more = table_source(table.rows(rest), table.file.parent, forgiven=len(named) - len(rest))
    return labelled, replace(more, notes=[*table.notes, *note_of(table, more.skipped, len(named))])


def _of_table(table: Table, spec: Spec, behind: Sequence[Spec]) -> Offers:
    """Open the images that a table names itself."""
    root = _root(spec, table)
    if behind and not leads_anywhere(table, root):
        raise LgpError(
            f"data.source: {spec.place} leads to no image itself, and stands before other sources: put it behind "
            "the source whose images it labels, or mend its paths"
        )
    return table_source(table, root)


def _refuse_files_of_two(apart: Sequence[Offers], specs: Sequence[Spec], tables: Sequence[Table | None]) -> None:
    """Refuse a table that opens files which another source offers too: each would be an image twice."""
    files: dict[int, set[str]] = {}
    for one, other in combinations(range(len(apart)), 2):
        both = [i for i in (one, other) if len(apart[i]) and apart[i].roots]
        if len(both) < 2 or not any(tables[i] for i in both):
            continue
        for i in both:
            files.setdefault(i, set(_real_files(apart[i])))
        if shared := sorted(files[one] & files[other]):
            raise LgpError(
                f"data.source: {specs[one].place} and {specs[other].place} lead to the same files ({shared[0]}, "
                f"{len(shared)} in all): put a table behind the source whose images it labels, without `root`, and "
                "name each image in one source"
            )


def _real_files(offers: Offers) -> Iterator[str]:
    """Iterate over the files of a source that has some, without the links to their folders."""
    (_, root), *_ = offers.roots
    folders: dict[str, str] = {}
    for path in offers.paths:
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = os.path.realpath(os.path.join(root, folder))
        yield f"{folders[folder]}/{name}"


def _of_its_name(offers: Offers, spec: Spec, specs: Sequence[Spec]) -> Offers:
    """Return one of several sources with the split that its name says (`test.tar`), if its images say none."""
    word = split_word(_name(spec)) if len(specs) > 1 else None
    if word is None or set(offers.splits) != {"train"}:
        return offers
    labels = [None if word in UNLABELED else label for label in offers.labels]
    return replace(offers, splits=[SPLITS[word]] * len(offers), labels=labels)


def specified(source: Source, columns: Columns = Columns()) -> Spec:
    """Return a source with its layout. That of a text is found by its name, and by what it leads to.

    Raises:
        LgpError: it leads nowhere, or to no known layout.
    """
    if not isinstance(source, str):
        return spec_of(source)
    if source == DIGITS:
        if _local(DIGITS).exists():
            raise LgpError(
                "data.source digits is the built-in set, and a folder here has the same name: write ./digits for the "
                "folder, or {builtin: digits}"
            )
        return Spec("builtin", DIGITS)
    for prefix in ("hf", "torchvision"):
        if source.startswith(f"{prefix}:"):
            return Spec(prefix, source.removeprefix(f"{prefix}:"))
    return Spec(_kind_of(source, columns), source)


def _kind_of(source: str, columns: Columns) -> str:
    path = _local(source)
    if any(mark in source for mark in "*?{[") and not path.exists():
        from lgp.data.sources.archives import expand

        path = expand(str(path))[0]
    if not path.exists():
        raise NoSource(f"data.source {source!r} does not exist (looked at {path.absolute()}): give {LAYOUTS}")
    if path.is_dir():
        return _kind_of_folder(path, columns)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise LgpError(f"data.source {source!r} is a file of no known layout: give {LAYOUTS}")
    return kind


def _kind_of_folder(folder: Path, columns: Columns) -> str:
    """Return the layout of a folder: Arrow or Parquet of a data set, archives, else images."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return "arrow"
    if _image_tables(folder, columns):
        return "parquet"
    names = [entry.name for entry in os.scandir(folder) if not is_clutter(entry.name)]
    kinds = {SUFFIXES.get(Path(name).suffix.lower()) for name in names}
    for kind in ("tar", "zip", "arrow"):
        if kinds == {kind}:
            return kind
    return "folder"


def _image_tables(folder: Path, columns: Columns) -> list[Path]:
    files = sorted(Path(file) for file in _visible_files(folder) if file.endswith(".parquet") and os.path.isfile(file))
    if not files:
        return []
    from lgp.data.sources.tables import is_image_table

    return [file for file in files if is_image_table(file, columns)]


def _visible_files(folder: Path) -> Iterator[str]:
    """Iterate over the files in a folder and below it, however deep, without clutter. Links to folders are files."""
    folders = [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                entries = [entry for entry in found if not is_clutter(entry.name)]
        except OSError:  # listed when the folder is walked
            continue
        folders += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        yield from (entry.path for entry in entries if not entry.is_dir(follow_symlinks=False))


def _local(source: str) -> Path:
    """Return a path on this machine. A relative one starts at the project, also in a copy of it for an experiment."""
    root = Path(os.environ.get("DVC_ROOT", "."))
    if "://" in source:
        from lgp.data.sources.remote import fetched

        try:
            return fetched(source, root / DOWNLOADS / sha256(source.encode()).hexdigest()[:16])
        except LgpError as e:
            raise NoSource(str(e)) from None
    # not Path.expanduser: it raises for a ~ that names no user
    return root / os.path.expanduser(source)


def _name(spec: Spec) -> str:
    return spec.place.rstrip("/").rpartition("/")[2].partition(".")[0] or spec.kind


def _table_of(spec: Spec, columns: Columns, specs: Sequence[Spec], behind: bool) -> Table | None:
    """Return the rows of a table of paths, None for any other source. `behind`: other sources stand before it.

    The name of one of several sources says the split of the rows that say none.
    """
    if spec.kind in TABLES:
        file = _existing(spec)
    elif _is_parquet_of_paths(spec, columns, behind or spec.root is not None):
        file = _local(spec.place)
    else:
        return None
    return read_table(file, columns).in_split(split_word(_name(spec)) if len(specs) > 1 else None)


def _is_parquet_of_paths(spec: Spec, columns: Columns, behind: bool) -> bool:
    """Return whether a Parquet file holds paths. One that stands alone may be read as a data set, by its own rules."""
    file = _local(spec.place)
    if spec.kind != "parquet" or not file.is_file():
        return False
    from lgp.data.sources.tables import holds_paths, is_image_table

    return holds_paths(file, columns) if behind else not is_image_table(file, columns)


def _root(spec: Spec, table: Table) -> Path:
    root = _local(spec.root) if spec.root else table.file.parent
    if not root.is_dir():
        raise NoSource(f"data.source root: {spec.root} is no folder (looked at {root.absolute()}): mend the path")
    return root


def _existing(spec: Spec) -> Path:
    path = _local(spec.place)
    if not path.exists():
        raise NoSource(
            f"data.source {spec.kind}: {spec.place} does not exist (looked at {path.absolute()}): mend the path"
        )
    return path


def _files(spec: Spec) -> list[Path]:
    """Return the files of a pattern, of a folder of such files, or the single file."""
    from lgp.data.sources.archives import expand

    path = _local(spec.place)
    if path.is_dir():
        files = map(Path, _visible_files(path))
        return sorted(file for file in files if SUFFIXES.get(file.suffix.lower()) == spec.kind and file.is_file())
    return [path] if path.is_file() else expand(str(path))


def _opened(spec: Spec, columns: Columns, labelling: Sequence[Table]) -> Offers:
    """Open a source that has images itself. `labelling`: the tables behind it, which may label them."""
    match spec.kind:
        case "builtin":
            from lgp.data.sources.arrays import digits_source

            return digits_source()
        case "folder":
            folder = _existing(spec)
            if not folder.is_dir():
                raise LgpError(f"data.source folder: {spec.place} is a file: give a folder, or {LAYOUTS}")
            return _of_folder(folder, spec.class_folders, columns, labelling)
        case "parquet":
            from lgp.data.sources.tables import parquet_source

            path = _existing(spec)
            if path.is_file():
                return parquet_source(path, [path], columns)
            files = _image_tables(path, columns)
            return _and_others(parquet_source(path, files, columns), path, files)
        case "arrow":
            from lgp.data.sources.tables import arrow_source

            return arrow_source(_existing(spec), columns)
        case "tar":
            from lgp.data.sources.archives import tar_source

            return tar_source(_files(spec), columns)
        case "zip":
            from lgp.data.sources.archives import zip_source

            return zip_source(_files(spec), columns)
        case "npz":
            from lgp.data.sources.arrays import npz_source

            return npz_source(_existing(spec), columns)
        case "hf":
            from lgp.data.sources.tables import hub_source

            return hub_source(spec.place, columns)
        case _:
            from lgp.data.sources.arrays import torchvision_source

            return torchvision_source(spec.place, _local(spec.root or str(DOWNLOADS / "torchvision")))


def _of_folder(folder: Path, class_folders: bool | None, columns: Columns, labelling: Sequence[Table]) -> Offers:
    """List an image folder. Unless it is said, its folders are classes if no table behind it labels an image of it."""
    walk = walk_folder(folder)
    if class_folders is None and labelling:
        without = folder_offers(walk, False, columns)
        if any(labels_any(without, table) for table in labelling):
            return without
    return folder_offers(walk, class_folders is not False, columns)


def _and_others(offers: Offers, folder: Path, tables: Sequence[Path]) -> Offers:
    """List what stands beside the tables of a folder."""
    walk = walk_folder(folder)
    known = {str(table.relative_to(folder)) for table in tables} | {s.path for s in [*offers.skipped, *offers.clutter]}
    others = [Skipped(printable(path), "no table of images, beside tables that are") for path in walk.files]
    found = [skip for skip in [*walk.skipped, *walk.clutter, *others] if skip.path not in known]
    return replace(offers, clutter=[*offers.clutter, *found])


def _joined(opened: Sequence[Offers], names: Sequence[str]) -> Offers:
    """Return several sources as one. Paths get the name of their source where there are several."""
    if len(opened) == 1:
        return opened[0]
    prefixes = [_prefix(names, i) for i in range(len(names))]
    classes = list(dict.fromkeys(chain.from_iterable(offers.classes for offers in opened)))
    return Offers(
        [f"{prefix}{path}" for prefix, offers in zip(prefixes, opened, strict=True) for path in offers.paths],
        list(chain.from_iterable(offers.splits for offers in opened)),
        list(chain.from_iterable(offers.labels for offers in opened)),
        list(chain.from_iterable(offers.groups for offers in opened)),
        list(chain.from_iterable(offers.states for offers in opened)),
        classes,
        partial(_reads_of, opened),
        [Skipped(f"{p}{s.path}", s.reason) for p, o in zip(prefixes, opened, strict=True) for s in o.skipped],
        [Skipped(f"{p}{s.path}", s.reason) for p, o in zip(prefixes, opened, strict=True) for s in o.clutter],
        declared=opened[0].declared,
        roots=tuple((p + start, root) for p, o in zip(prefixes, opened, strict=True) for start, root in o.roots),
        notes=list(chain.from_iterable(offers.notes for offers in opened)),
    )


def _prefix(names: Sequence[str], number: int) -> str:
    name = names[number]
    if not name:  # several sources, joined before
        return ""
    return f"{name}/" if names.count(name) == 1 else f"{name}-{number + 1}/"


def _reads_of(opened: Sequence[Offers], positions: Sequence[int]) -> Iterator[Read]:
    start = 0
    for offers in opened:
        end = start + len(offers)
        yield from offers.reads([position - start for position in positions if start <= position < end])
        start = end


def said(sources: Sequence[Source]) -> str:
    """Return sources as text, for messages, without the passwords in addresses."""
    texts = (source if isinstance(source, str) else f"{source.kind}: {source.place}" for source in sources)
    return ", ".join(map(without_credentials, texts))


def open_images(source: str) -> Offers:
    """Open a data source, or a single image file."""
    file = _local(source)
    if "://" not in source and file.is_file() and file.suffix.lower() not in SUFFIXES:
        return single_image(file)
    return open_sources([source])
