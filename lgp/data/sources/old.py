"""Data sources. A source describes and reads its images in a fixed order. It decodes nothing."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lgp.errors import LgpError

DIGITS = "digits"
PARQUET_SPLITS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "unlabeled": "unlabeled",
}


class Described(NamedTuple):
    """A source's description of an image. It does not read the image.

    `split` is train, test or unlabeled. `label` is an index into the class names, -1 without a label. `path` is the
    image's identity within its source.
    """

    split: str
    label: int
    path: str


class Record(NamedTuple):
    """One image before decoding: `read` returns the encoded bytes, or pixels (H, W, C) uint8."""

    about: Described
    read: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """Images in a fixed order.

    Attributes:
        classes: class names.
        described: returns a new iterator over the descriptions, one per image.
        records: returns a new iterator over the records, in the same order.
    """

    classes: list[str]
    described: Callable[[], Iterator[Described]]
    records: Callable[[], Iterator[Record]]


def open_source(source: str) -> Source:
    """Open `digits`, an image folder, or a folder (or file) of Parquet in Hugging Face's image layout.

    Raises:
        LgpError: the source does not exist, or has none of the three layouts.
    """
    if source == DIGITS:
        return _digits()
    # a relative path starts at the project, also if an experiment runs in a copy of it
    path = Path(os.environ.get("DVC_ROOT", ".")) / Path(source).expanduser()
    if not path.exists():
        raise LgpError(
            f"data.source {source!r} does not exist (looked at {path.absolute()}): give `digits`, an image folder "
            "with train/CLASS/*.jpg, or a folder of Parquet files train-*.parquet"
        )
    files = [path] if path.suffix == ".parquet" else sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
    if files:
        return _parquet(path, files)
    if (path / "train").is_dir():
        return _image_folder(path)
    folders = [p.name for p in _visible(path) if p.is_dir()] if path.is_dir() else []
    found = f" (found the folders {', '.join(folders[:3])}: are these classes? then move them into train/)"
    raise LgpError(
        f"data.source {source!r} holds neither train/CLASS/*.jpg nor train-*.parquet: arrange it as one of the two"
        + (found if folders else "")
    )


def _digits() -> Source:
    """Open scikit-learn's 1,797 handwritten digits: 8×8 pixels, 17 grey levels, no test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0..16 → 0..255, the whole range of a byte
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]

    def described() -> Iterator[Described]:
        return (Described("train", int(label), f"{DIGITS}/{i}") for i, label in enumerate(digits.target))

    def records() -> Iterator[Record]:
        return (Record(about, partial(_same, image)) for about, image in zip(described(), pixels, strict=True))

    return Source([str(name) for name in digits.target_names], described, records)


def _same(data: bytes | np.ndarray) -> bytes | np.ndarray:
    return data


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _image_folder(root: Path) -> Source:
    """Open `train/CLASS/*`, optional `test/CLASS/*`, optional `unlabeled/**`. Hidden files are ignored.

    A link to a folder is followed, unless that folder is read anyway, holds one that is, or lies in one. Such a link is
    described as if it were an image, and is later listed as unreadable. So each folder is read once, and no walk loops.
    """
    classes = [p.name for p in _visible(root / "train") if p.is_dir()]
    if not classes:
        raise LgpError(f"{root / 'train'} has no class folder: expected {root / 'train'}/CLASS/*.jpg")
    test = root / "test"
    unknown = sorted({p.name for p in _visible(test) if p.is_dir()} - set(classes)) if test.is_dir() else []
    if unknown:
        raise LgpError(f"{test} has classes that train lacks: {', '.join(unknown)}; rename or remove them")

    def described() -> Iterator[Described]:
        entries = [(split, p) for split in ("train", "test") if (root / split).is_dir() for p in _visible(root / split)]
        if (root / "unlabeled").is_dir():
            entries.append(("unlabeled", root / "unlabeled"))
        read = [entry.resolve() for _, entry in entries if entry.is_dir()]
        for split, entry in entries:
            # a file outside a class folder has no label; it is later listed as unreadable
            label = classes.index(entry.name) if split != "unlabeled" and entry.is_dir() else -1
            for file in _files_below(entry, read) if entry.is_dir() else [entry]:
                yield Described(split, label, str(file.relative_to(root)))

    def records() -> Iterator[Record]:
        return (Record(about, partial(_file_bytes, root / about.path)) for about in described())

    return Source(classes, described, records)


def _files_below(folder: Path, read: list[Path]) -> Iterator[Path]:
    """Walk the files below a folder in the order of their paths, and what cannot be walked.

    Args:
        folder: where to start.
        read: real paths of folders that are read. Those of followed links are added.
    """
    try:
        with os.scandir(folder) as entries:
            inside = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError:
        yield folder  # later listed as unreadable with the system's reason
        return
    for entry in inside:
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(path, read)
        elif not os.path.isdir(path):
            yield path  # also a broken link, which is later listed as unreadable
        elif any(_overlap(path.resolve(), other) for other in read):
            yield path
        else:
            read.append(path.resolve())
            yield from _files_below(path, read)


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _file_bytes(path: Path) -> bytes:
    if path.is_symlink() and path.is_dir():
        raise ValueError("a link to a folder that is read anyway, holds one that is, or lies in one")
    return path.read_bytes()


def _parquet(root: Path, files: list[Path]) -> Source:
    """Open Parquet files as `datasets` writes images: `image` = struct(bytes, path), `label` = int64.

    The split is the first known word of the file name (`train-00000-of-00004.parquet`), else of the folder. If
    there is no test split, a validation split takes its place. Otherwise the validation split is left out. Class names
    are in the schema's metadata under `huggingface`. Without them, the labels found are the names. Training images
    without a label (none, or negative) serve pre-training. Test images without a label are listed as unreadable.
    """
    import pyarrow.parquet as pq

    splits = {f: _parquet_split(f) for f in files}
    if "train" not in splits.values():
        raise LgpError(f"{root} has no Parquet file of a train split: name one train-*.parquet")
    stands_for_test = "test" if "test" in splits.values() else "validation"
    chosen = {
        f: "test" if s == stands_for_test else s
        for f, s in splits.items()
        if s in ("train", "unlabeled", stands_for_test)
    }
    for file, split in chosen.items():
        _check_parquet(file, labelled=split != "unlabeled")
    train = [f for f, s in chosen.items() if s == "train"]
    folder = root if root.is_dir() else root.parent  # files of two folders may share a name
    names = _parquet_classes(pq.read_schema(train[0]))
    found = {v for f in train for v in pq.read_table(f, columns=["label"])["label"].drop_null().unique().to_pylist()}
    index = {i: i for i in range(len(names))} or {
        label: i for i, label in enumerate(sorted(v for v in found if v >= 0))
    }

    def described() -> Iterator[Described]:
        return (about for about, _ in rows([]))

    def records() -> Iterator[Record]:
        for about, row in rows(["image"]):
            yield Record(about, partial(_same, (row["image"] or {}).get("bytes") or b""))

    def rows(columns: list[str]) -> Iterator[tuple[Described, dict[str, Any]]]:
        for file, split in chosen.items():
            of_file = columns if split == "unlabeled" else [*columns, "label"]
            for number, row in enumerate(_rows_of(file, of_file)):
                given = row.get("label")
                label = -1 if given is None else index.get(given, -1)
                if label < 0 and given is not None and given >= 0:
                    raise LgpError(
                        f"{file}: row {number} has the label {given}, which is none of the {len(index)} classes "
                        f"({'named in the schema' if names else 'found in train'}): mend or remove it"
                    )
                of_row = "unlabeled" if split == "train" and label < 0 else split
                yield Described(of_row, label, f"{file.relative_to(folder)}#{number}"), row

    return Source(names or [str(label) for label in index], described, records)


def _rows_of(file: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Read columns of a Parquet file row by row. Without columns, every row is empty."""
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(file)
    if not columns:
        return ({} for _ in range(opened.metadata.num_rows))
    return (row for batch in opened.iter_batches(256, columns=columns) for row in batch.to_pylist())


def _check_parquet(file: Path, labelled: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as e:
        raise LgpError(f"{file} cannot be read as Parquet: {' '.join(str(e).split())}") from None
    types = dict(zip(schema.names, schema.types, strict=True))
    image, label = types.get("image"), types.get("label")
    fields = {image.field(i).name for i in range(image.num_fields)} if image and pa.types.is_struct(image) else set()
    if "bytes" not in fields:
        raise LgpError(
            f"{file}: column `image` is {image or 'absent'}: expected struct(bytes, path), as `datasets` writes it"
        )
    if labelled and not (label and pa.types.is_integer(label)):
        raise LgpError(f"{file}: column `label` is {label or 'absent'}: expected integers, as `datasets` writes it")


def _parquet_split(file: Path) -> str:
    for word in [*re.split(r"[^a-z]+", file.stem.lower()), file.parent.name.lower()]:
        if word in PARQUET_SPLITS:
            return PARQUET_SPLITS[word]
    raise LgpError(f"cannot tell the split of {file}: start its name with train-, test- or unlabeled-")


def _parquet_classes(schema: Any) -> list[str]:
    raw = (schema.metadata or {}).get(b"huggingface", b"{}")
    label = json.loads(raw).get("info", {}).get("features", {}).get("label", {})
    return list(label.get("names", []))
