"""Data sources: each yields records of one image, in a fixed order, decoding nothing."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lgp.errors import LgpError

PARQUET_SPLITS = {"train": "train", "test": "test", "validation": "test", "valid": "test", "unlabeled": "unlabeled"}


@dataclass(frozen=True)
class Record:
    """One image before decoding.

    `split` is train, test or unlabeled; `label` an index into the class names, -1 where there is none;
    `path` names the image in messages; `read` gives the encoded bytes, or pixels (H, W, C) uint8.
    """

    split: str
    label: int
    path: str
    read: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """Class names, and a function that starts the records anew."""

    classes: list[str]
    records: Callable[[], Iterator[Record]]


def open_source(source: str) -> Source:
    """Open `digits`, an image folder, or a folder (or file) of Parquet in Hugging Face's image layout.

    Raises:
        LgpError: nothing there, or nothing that looks like one of the three layouts.
    """
    if source == "digits":
        return _digits()
    path = Path(source).expanduser()
    if not path.exists():
        raise LgpError(
            f"data.source {source!r} does not exist (looked at {path.absolute()}): give `digits`, an image folder "
            "with train/CLASS/*.jpg, or a folder of Parquet files train-*.parquet"
        )
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if path.is_dir() and (path / "train").is_dir() and not files:
        return _image_folder(path)
    if files and all(f.suffix == ".parquet" for f in files):
        return _parquet(path, files)
    raise LgpError(
        f"data.source {source!r} holds neither train/CLASS/*.jpg nor train-*.parquet: arrange it as one of the two"
    )


def _digits() -> Source:
    """Scikit-learn's 1,797 handwritten digits of 8×8 pixels, 17 grey levels, without a split of their own."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 0..16 → 0..255, the whole range of a byte
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]

    def records() -> Iterator[Record]:
        for i, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
            yield Record("train", int(label), f"digits/{i}", partial(_same, image))

    return Source([str(name) for name in digits.target_names], records)


def _same(data: bytes | np.ndarray) -> bytes | np.ndarray:
    return data


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _image_folder(root: Path) -> Source:
    """`train/CLASS/*`, optional `test/CLASS/*`, optional `unlabeled/**`; hidden files are not looked at."""
    classes = [p.name for p in _visible(root / "train") if p.is_dir()]
    if not classes:
        raise LgpError(f"{root / 'train'} has no class folder: expected {root / 'train'}/CLASS/*.jpg")
    test = root / "test"
    unknown = sorted({p.name for p in _visible(test) if p.is_dir()} - set(classes)) if test.is_dir() else []
    if unknown:
        raise LgpError(f"{test} has classes that train lacks: {', '.join(unknown)}; rename or remove them")

    def records() -> Iterator[Record]:
        for split in ("train", "test"):
            for entry in _visible(root / split) if (root / split).is_dir() else []:
                # a file outside a class folder has no label: it is read as one, and listed as unreadable
                label = classes.index(entry.name) if entry.is_dir() else -1
                for file in _files_below(entry):
                    yield Record(split, label, str(file.relative_to(root)), file.read_bytes)
        if (root / "unlabeled").is_dir():
            for file in _files_below(root / "unlabeled"):
                yield Record("unlabeled", -1, str(file.relative_to(root)), file.read_bytes)

    return Source(classes, records)


def _files_below(entry: Path) -> list[Path]:
    if entry.is_file():
        return [entry]
    return [p for p in sorted(entry.rglob("*")) if p.is_file() and not p.name.startswith(".")]


def _parquet(root: Path, files: list[Path]) -> Source:
    """Parquet as `datasets` writes images: `image` = struct(bytes, path), `label` = int64.

    The split is the first known word of the file name (`train-00000-of-00004.parquet`); class names are
    in the schema's metadata under `huggingface`, or the label numbers themselves.
    """
    import pyarrow.parquet as pq

    splits = {f: _parquet_split(f) for f in files}
    if "train" not in splits.values():
        raise LgpError(f"{root} has no Parquet file of a train split: name one train-*.parquet")
    classes = _parquet_classes(pq.read_schema(files[0]))
    labelled = [f for f in files if splits[f] != "unlabeled"]
    for file in files:
        schema = pq.read_schema(file)
        wanted = ["image", "label"] if file in labelled else ["image"]
        missing = [c for c in wanted if c not in schema.names]
        if missing:
            raise LgpError(
                f"{file} has no column {' and no '.join(missing)} (it has {', '.join(schema.names)}): expected `image` "
                "as struct(bytes, path) and `label` as int64"
            )
    if not classes:
        found: set[int] = set()
        for file in labelled:
            found |= set(pq.read_table(file, columns=["label"])["label"].drop_null().to_pylist())
        classes = [str(i) for i in range(max(found, default=-1) + 1)]

    def records() -> Iterator[Record]:
        for file in files:
            labels = splits[file] != "unlabeled"
            columns = ["image", "label"] if labels else ["image"]
            row = 0
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=columns):
                for item in batch.to_pylist():
                    label = item["label"] if labels and item["label"] is not None else -1
                    data = (item["image"] or {}).get("bytes") or b""
                    # without a usable label it can still serve pre-training
                    split = splits[file] if 0 <= label < len(classes) else "unlabeled"
                    yield Record(
                        split, label if split != "unlabeled" else -1, f"{file.name}#{row}", partial(_same, data)
                    )
                    row += 1

    return Source(classes, records)


def _parquet_split(file: Path) -> str:
    for word in [*re.split(r"[^a-z]+", file.stem.lower()), file.parent.name.lower()]:
        if word in PARQUET_SPLITS:
            return PARQUET_SPLITS[word]
    raise LgpError(f"cannot tell the split of {file}: start its name with train-, test- or unlabeled-")


def _parquet_classes(schema: Any) -> list[str]:
    raw = (schema.metadata or {}).get(b"huggingface")
    feature = json.loads(raw)["info"]["features"].get("label", {}) if raw else {}
    return list(feature.get("names", []))
