"""From a data source to prepared data: decode everything once, split, draw few-label subsets, digest."""

import hashlib
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from lgp.data.leaks import EXACT, Leak, find_leaks, perceptual_hash
from lgp.data.prepared import Prepared, decode
from lgp.data.sources import Record, open_source
from lgp.data.splits import cap, few_label_subsets, hold_out
from lgp.data.subset_lists import read_subset_list
from lgp.errors import LgpError, check_disk_space
from lgp.params import DataParams

SHARD_BYTES = 512 * 2**20
ARRAY_BYTES = 4 * 2**30  # above this, images stay encoded even where all have the model's size
STATISTICS_IMAGES = 10_000
SHOWN_LEAKS = 100  # with their names; all are counted

Index = list[dict[str, Any]]


def prepare(params: DataParams, seed: int, folder: Path) -> dict[str, Any]:
    """Write prepared data into `folder` (empty, existing) and return its metrics.

    Args:
        params: the `data` section.
        seed: the run's seed; splits and subsets follow from it.
        folder: where to write.

    Returns:
        Counts per split, classes, the digest, the test images that also stand elsewhere, and the unreadable files with
        path and reason.

    Raises:
        LgpError: no such source, a class without a readable image, too many unreadable files.
    """
    source = open_source(params.source)
    paths, splits, labels = _described_records(source.records())
    _check_shots(labels[splits == "train"], source.classes, params)
    lists = {
        name: [read_subset_list(Path(file), paths, labels, splits.tolist(), source.classes) for file in files]
        for name, files in params.few_label_lists.items()
    }
    wanted = _within_caps(splits, labels, lists, params, seed)
    hashed = params.near_duplicate_bits is not None
    index, unreadable, content = _store_encoded(source.records(), wanted, params.channels, hashed, folder)
    _check_readable(unreadable, len(index) + len(unreadable), params)
    table = pd.DataFrame(index)
    _check_classes(table, source.classes)
    listed = {name: [_rows_of(table, paths, of, name) for of in found] for name, found in lists.items()}
    _split(table, params, seed, listed)
    leaks = _leaks(table, params)
    table = table.drop(columns=["content", "hash"])
    if _all_of_size(table, params):
        _decode_to_array(folder, table, params)
    table.to_parquet(folder / "index.parquet", index=False)
    train = np.flatnonzero(table["split"] == "train")
    labels = table["label"].to_numpy()
    subsets = few_label_subsets(
        labels[train], params.few_label_shares, params.few_label_shots, params.few_label_subsets, seed, source.classes
    )
    ids = {name: [train[s].tolist() for s in drawn] for name, drawn in subsets.items()}
    ids |= {name: [_still_training(table, rows, name) for rows in lists] for name, lists in listed.items()}
    (folder / "subsets.json").write_text(json.dumps(ids))
    meta = {
        "classes": source.classes,
        "image_size": params.image_size,
        "channels": params.channels,
        "eval_crop": params.eval_crop,
        "mean": params.mean,
        "std": params.std,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    if params.mean is None or params.std is None:
        mean, std = _statistics(Prepared(folder))
        meta |= {"mean": params.mean or mean, "std": params.std or std}
    digest = hashlib.sha256(content)
    digest.update(table.to_csv(index=False).encode())
    digest.update(json.dumps([ids, meta], sort_keys=True).encode())
    meta["digest"] = digest.hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))
    counts = table["split"].value_counts()
    return {
        **{f"images/{split}": int(counts.get(split, 0)) for split in ("train", "unlabeled", "val", "test", "dropped")},
        "classes": len(source.classes),
        **{f"labels/{name}": len(drawn[0]) for name, drawn in ids.items()},
        "leaks/exact": sum(leak.bits == EXACT for leak in leaks),
        "leaks/near": sum(leak.bits != EXACT for leak in leaks),
        "leaks": [_described(leak, table) for leak in leaks[:SHOWN_LEAKS]],
        "unreadable": unreadable,
        "unreadable_share": round(len(unreadable) / (len(index) + len(unreadable)), 6),
        "digest": digest.hexdigest(),
    }


def _described_records(records: Iterator[Record]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return path, split and label of every record, before any is decoded."""
    seen = [(r.path, r.split, r.label) for r in records]
    splits, labels = np.array([s for _, s, _ in seen], dtype=str), np.array([i for _, _, i in seen], dtype=np.int64)
    return [path for path, _, _ in seen], splits, labels


def _check_shots(labels: np.ndarray, classes: list[str], params: DataParams) -> None:
    """Raise `LgpError` where a class has fewer images than a shot asks for, whatever is held out of it later."""
    few_label_subsets(labels[labels >= 0], {}, params.few_label_shots, 0, 0, classes)


def _within_caps(
    splits: np.ndarray, labels: np.ndarray, lists: dict[str, list[np.ndarray]], params: DataParams, seed: int
) -> set[int] | None:
    """Return the positions of the records to keep, or None for all; those of published lists stay."""
    if params.max_train_images is None and params.max_test_images is None:
        return None
    kept = np.ones(len(splits), dtype=bool)
    for split, most in (("train", params.max_train_images), ("test", params.max_test_images)):
        positions = np.flatnonzero((splits == split) & (labels >= 0))
        if most is not None and len(positions) > most:
            kept[positions] = cap(labels[positions], most, seed, split)
    for positions in itertools.chain.from_iterable(lists.values()):
        kept[positions] = True
    return set(np.flatnonzero(kept).tolist())


@dataclass(frozen=True)
class _Read:
    """A record that was read and decoded: its bytes, size and perceptual hash; or why that failed."""

    record: Record
    data: bytes = b""
    height: int = 0
    width: int = 0
    hash: int = 0
    fault: str = ""


def _read(record: Record, channels: int, hashed: bool) -> _Read:
    if record.split != "unlabeled" and record.label < 0:
        return _Read(record, fault="without a label: not inside a class folder, or none in its row")
    try:
        data = record.read()
        if isinstance(data, np.ndarray):
            data = _png(data)
        if not data:
            return _Read(record, fault="empty")
        image = decode(data, channels)
        return _Read(record, data, image.height, image.width, perceptual_hash(image) if hashed else 0)
    except Exception as e:  # noqa: BLE001 - decoders of damaged files raise whatever they like
        # PIL's message may name an object's address in memory, which differs from run to run
        reason = "not an image that can be decoded" if "cannot identify" in str(e) else str(e) or type(e).__name__
        return _Read(record, fault=reason)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "png")
    return buffer.getvalue()


def _store_encoded(
    records: Iterator[Record], wanted: set[int] | None, channels: int, hashed: bool, folder: Path
) -> tuple[Index, list[dict[str, str]], bytes]:
    """Write the encoded bytes of all readable records to Arrow shards, in order; decoding is threaded."""
    index: Index = []
    unreadable: list[dict[str, str]] = []
    content = hashlib.sha256()

    def readable() -> Iterator[bytes]:
        chosen = (r for i, r in enumerate(records) if wanted is None or i in wanted)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while chunk := list(itertools.islice(chosen, 1024)):
                for read in pool.map(lambda r: _read(r, channels, hashed), chunk):
                    record = read.record
                    if read.fault:
                        unreadable.append({"path": record.path, "reason": read.fault})
                        continue
                    digest = hashlib.sha256(read.data).digest()
                    content.update(digest)
                    row = {"split": record.split, "label": record.label, "path": record.path}
                    row |= {"height": read.height, "width": read.width, "content": digest, "hash": read.hash}
                    index.append(row)
                    yield read.data

    _write_shards(readable(), folder)
    if not index and not unreadable:
        raise LgpError("the data source holds no image at all")
    return index, unreadable, content.digest()


def _write_shards(images: Iterable[bytes], folder: Path) -> None:
    schema = pa.schema([("image", pa.large_binary())])
    pending = iter(images)
    for number in itertools.count():
        first = next(pending, None)
        if first is None:
            return
        with pa.ipc.new_file(str(folder / f"images-{number:05d}.arrow"), schema) as writer:
            written = 0
            for data in itertools.chain([first], pending):
                writer.write_batch(pa.record_batch([pa.array([data], pa.large_binary())], schema=schema))
                written += len(data)
                if written >= SHARD_BYTES:
                    break


def _check_readable(unreadable: list[dict[str, str]], total: int, params: DataParams) -> None:
    share = len(unreadable) / total
    if len(unreadable) == total or share > params.max_unreadable_share:
        few = "; ".join(f"{u['path']} ({u['reason']})" for u in unreadable[:3]) + ("; …" if len(unreadable) > 3 else "")
        raise LgpError(
            f"{len(unreadable)} of {total} files of {params.source} cannot be read, {share:.1%}, more than "
            f"data.max_unreadable_share {params.max_unreadable_share:.1%}: {few}; "
            "remove them, or raise that share"
        )


def _check_classes(table: pd.DataFrame, classes: list[str]) -> None:
    found = Counter(table.loc[table["split"] == "train", "label"])
    empty = [name for label, name in enumerate(classes) if not found[label]]
    if empty:
        raise LgpError(f"no readable training image in class {', '.join(empty)}: add some, or remove the class")
    if len(classes) < 2:
        raise LgpError(f"the only class is {classes[0]!r}: evaluation needs two or more, add another class folder")
    needed = 2 if (table["split"] == "test").any() else 3
    scarce = [f"{name} ({found[label]})" for label, name in enumerate(classes) if found[label] < needed]
    if scarce:
        raise LgpError(
            f"fewer than {needed} readable training images in class {', '.join(scarce)}: one each is held out for "
            "validation (and for test, without a test part), add some or remove the class"
        )


def _rows_of(table: pd.DataFrame, paths: list[str], positions: np.ndarray, name: str) -> np.ndarray:
    """Find the stored rows of a list's images; raise `LgpError` where one could not be read."""
    rows = {path: row for row, path in enumerate(table["path"].tolist())}
    gone = [paths[i] for i in positions.tolist() if paths[i] not in rows]
    if gone:
        raise LgpError(
            f"data.few_label_lists.{name} names {', '.join(gone[:3])}{' and more' if len(gone) > 3 else ''}, which "
            "cannot be read: mend the files, or take them off the list"
        )
    return np.array([rows[paths[i]] for i in positions.tolist()], dtype=np.int64)


def _still_training(table: pd.DataFrame, rows: np.ndarray, name: str) -> list[int]:
    """Return the ids of a list's images; raise `LgpError` where one is no training image any more."""
    gone = [str(table.at[i, "path"]) for i in rows.tolist() if table.at[i, "split"] != "train"]
    if gone:
        raise LgpError(
            f"data.few_label_lists.{name} names {', '.join(gone[:3])}{' and more' if len(gone) > 3 else ''}, which "
            "are dropped as also standing in test: take them off the list, or set data.leaks to drop_test"
        )
    return rows.tolist()


def _split(table: pd.DataFrame, params: DataParams, seed: int, listed: dict[str, list[np.ndarray]]) -> None:
    """Hold out a test part where the source has none, and a validation part, of the labelled training images.

    Images of published lists are training images, so they stay behind.
    """
    kept = np.zeros(len(table), dtype=bool)
    for rows in itertools.chain.from_iterable(listed.values()):
        kept[rows] = True
    if not (table["split"] == "test").any():
        _hold_out(table, params.test_share, seed, "test", kept)
    _hold_out(table, params.val_share, seed, "val", kept)


def _hold_out(table: pd.DataFrame, share: float, seed: int, name: str, kept: np.ndarray) -> None:
    train = np.flatnonzero(table["split"] == "train")
    held = hold_out(table["label"].to_numpy()[train], share, seed, name, kept[train])
    table.loc[train[held], "split"] = name


def _leaks(table: pd.DataFrame, params: DataParams) -> list[Leak]:
    """Find the test images that also stand elsewhere, and take one of both out where `data.leaks` says so.

    Raises:
        LgpError: a class is left without a test, or training, image.
    """
    is_test = (table["split"] == "test").to_numpy()
    leaks, in_test = find_leaks(
        table["content"].to_numpy(),
        table["hash"].to_numpy(dtype=np.uint64),
        np.flatnonzero(is_test),
        np.flatnonzero(~is_test),
        params.near_duplicate_bits,
    )
    if params.leaks != "report":
        parts = ("test",) if params.leaks == "drop_test" else ("train", "val")
        before = {part: set(table.loc[table["split"] == part, "label"]) for part in parts}
        dropped = [leak.test for leak in leaks] if params.leaks == "drop_test" else in_test
        table.loc[dropped, "split"] = "dropped"
        for part in parts:
            if before[part] - set(table.loc[table["split"] == part, "label"]):
                raise LgpError(
                    f"data.leaks {params.leaks} leaves a class without an image in {part}: lower "
                    "data.near_duplicate_bits, or set data.leaks to report and look at them in metrics/prepare.json"
                )
    return leaks


def _described(leak: Leak, table: pd.DataFrame) -> dict[str, str]:
    same = "the same file" if leak.bits == EXACT else f"near, {leak.bits} of 64 bits apart"
    return {"test": str(table["path"].iat[leak.test]), "also": str(table["path"].iat[leak.learnt]), "how": same}


def _all_of_size(table: pd.DataFrame, params: DataParams) -> bool:
    size = params.image_size
    fits = len(table) * size * size * params.channels <= ARRAY_BYTES
    return fits and bool((table["height"] == size).all() and (table["width"] == size).all())


def _decode_to_array(folder: Path, table: pd.DataFrame, params: DataParams) -> None:
    """Replace the shards by one array of pixels."""
    encoded = sorted(folder.glob("images-*.arrow"))
    shape = (len(table), params.image_size, params.image_size, params.channels)
    # writing through a map on a full disk would be killed by the system, not raise
    check_disk_space(folder, math.prod(shape))
    pixels = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    row = 0
    for path in encoded:
        for data in pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"]:
            pixels[row] = np.asarray(decode(data.as_py(), params.channels)).reshape(shape[1:])
            row += 1
    pixels.flush()
    for path in encoded:
        path.unlink()


def _statistics(prepared: Prepared) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of (a sample of) the training images, pixels in [0, 1]."""
    ids = prepared.pretraining_ids
    ids = ids[:: max(1, len(ids) // STATISTICS_IMAGES)]
    count, total, squares = 0, np.zeros(prepared.channels), np.zeros(prepared.channels)
    for start in range(0, len(ids), 256):
        pixels = prepared.whole(ids[start : start + 256]).numpy() / 255.0
        count += pixels[:, 0].size
        total += pixels.sum(axis=(0, 2, 3))
        squares += (pixels**2).sum(axis=(0, 2, 3))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # constant images (one flat colour) must not divide by zero
    return [round(float(m), 6) for m in mean], [round(max(float(s), 1e-3), 6) for s in std]
