"""From a data source to prepared images: choose, decode once, hold out a test and a validation part, digest.

Labels are read for one purpose: the held-out parts are balanced over classes. They are not stored here.
`lgp.data.labels` reads them again.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lgp.data.leaks import find_leaks
from lgp.data.sources import Described, Source, open_source
from lgp.data.splits import cap, check_class_sizes, hold_out
from lgp.data.storage import INDEX, META, PARTS, Images
from lgp.data.writing import Stored, decode_to_array, have_one_size, store_encoded
from lgp.errors import LgpError
from lgp.params.data import DataParams

STATISTICS_IMAGES = 10_000


def prepare(params: DataParams, seed: int, folder: Path) -> dict[str, Any]:
    """Write prepared images into the empty, existing `folder`. Return its metrics.

    Args:
        params: the section `data`.
        seed: the run's seed. It decides the held-out parts.
        folder: where to write.

    Returns:
        Counts per part, the digest, and the unreadable files with path and reason.

    Raises:
        LgpError: there is no such source, a class has too few readable images, or too many files are unreadable.
    """
    source = open_source(params.source)
    stored = store_encoded(source.records(), _within_caps(source, params, seed), params.channels, folder)
    _check_readable(stored, params)
    index = stored.table.drop(columns=["split", "label"]).assign(
        part=_parts(stored.table, source.classes, params, seed)
    )
    if have_one_size(index, params):
        decode_to_array(folder, len(index), params)
    index.to_parquet(folder / INDEX, index=False)
    digest = _write_meta(folder, index, params)
    counts = index["part"].value_counts()
    return {
        **{f"images/{part}": int(counts.get(part, 0)) for part in PARTS},
        "unreadable": stored.unreadable,
        "unreadable_share": round(len(stored.unreadable) / (len(index) + len(stored.unreadable)), 6),
        "digest": digest,
    }


def _within_caps(source: Source, params: DataParams, seed: int) -> set[int] | None:
    """Return the positions of the records to keep, None for all.

    Unlabelled images are training images. Images of train or test that lack the label they need are kept: they are
    listed as unreadable.
    """
    if params.max_train_images is None and params.max_test_images is None:
        return None
    described = pd.DataFrame(source.described(), columns=Described._fields)
    labels, kept = described["label"].to_numpy(), np.ones(len(described), dtype=bool)
    splits, labelled = described["split"].to_numpy(), labels >= 0
    candidates = {
        "train": (splits == "train") & labelled | (splits == "unlabeled"),
        "test": (splits == "test") & labelled,
    }
    for split, most in (("train", params.max_train_images), ("test", params.max_test_images)):
        positions = np.flatnonzero(candidates[split])
        if most is not None and len(positions) > most:
            kept[positions] = cap(labels[positions], most, seed, split)
    return set(np.flatnonzero(kept).tolist())


def _check_readable(stored: Stored, params: DataParams) -> None:
    unreadable, total = stored.unreadable, len(stored.table) + len(stored.unreadable)
    share = len(unreadable) / total
    if len(unreadable) == total or share > params.max_unreadable_share:
        few = "; ".join(f"{u['path']} ({u['reason']})" for u in unreadable[:3]) + ("; …" if len(unreadable) > 3 else "")
        raise LgpError(
            f"{len(unreadable)} of {total} files of {params.source} cannot be read, {share:.1%}, more than "
            f"data.max_unreadable_share {params.max_unreadable_share:.1%}: {few}; "
            "remove them, or raise that share"
        )


def _parts(table: pd.DataFrame, classes: list[str], params: DataParams, seed: int) -> np.ndarray:
    """Return the part of each image, (N,): train (labelled or not), val, test, or dropped.

    If the source has no test part, one is held out of the labelled training images. A validation part is held out next.
    """
    labels = table["label"].to_numpy()
    train, test = (table["split"].to_numpy() == split for split in ("train", "test"))
    check_class_sizes(labels[train], classes, needed=2 if test.any() else 3)
    parts = np.where(test, "test", "train").astype(object)
    for part, share in (("test", params.test_share), ("val", params.val_share)):
        if part == "test" and test.any():
            continue
        candidates = np.flatnonzero(train & (parts == "train"))
        parts[candidates[hold_out(labels[candidates], share, seed, part)]] = part
    if params.drop_near_test_bits is not None:
        _drop_near_test(table, parts, params.drop_near_test_bits)
    return parts


def _drop_near_test(table: pd.DataFrame, parts: np.ndarray, bits: int) -> None:
    """Drop the images of train and val that also occur in test, exactly or nearly.

    Raises:
        LgpError: a class is left without an image in train or val.
    """
    labels, kept = table["label"].to_numpy(), ("train", "val")
    before = {part: set(labels[(parts == part) & (labels >= 0)]) for part in kept}
    is_test = parts == "test"
    content, hashes = table["content"].to_numpy(), table["hash"].to_numpy(dtype=np.uint64)
    _, in_test = find_leaks(content, hashes, np.flatnonzero(is_test), np.flatnonzero(~is_test), bits)
    parts[in_test] = "dropped"
    for part in kept:
        if before[part] - set(labels[parts == part]):
            raise LgpError(
                f"data.drop_near_test_bits {bits} leaves a class without an image in {part}: lower it, or set it to "
                "null and look at the leaks in metrics/labels.json"
            )


def _write_meta(folder: Path, index: pd.DataFrame, params: DataParams) -> str:
    """Write the properties common to all images, and a digest of everything prepared. Return the digest."""
    meta: dict[str, Any] = {
        "image_size": params.image_size,
        "channels": params.channels,
        "eval_crop": params.eval_crop,
        "mean": params.mean,
        "std": params.std,
    }
    (folder / META).write_text(json.dumps(meta))
    if params.mean is None or params.std is None:
        mean, std = _statistics(Images(folder))
        meta |= {"mean": params.mean or mean, "std": params.std or std}
    digest = hashlib.sha256(b"".join(index["content"]))
    digest.update(index.drop(columns="content").to_csv(index=False).encode())
    digest.update(json.dumps(meta, sort_keys=True).encode())
    meta["digest"] = digest.hexdigest()
    (folder / META).write_text(json.dumps(meta, indent=2))
    return digest.hexdigest()


def _statistics(images: Images) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel of the training images or a sample. Pixels are in [0, 1]."""
    ids = images.pretraining_ids
    ids = ids[:: max(1, len(ids) // STATISTICS_IMAGES)]
    count, total, squares = 0, np.zeros(images.channels), np.zeros(images.channels)
    for start in range(0, len(ids), 256):
        pixels = images.whole(ids[start : start + 256]).numpy() / 255.0
        count += pixels[:, 0].size
        total += pixels.sum(axis=(0, 2, 3))
        squares += (pixels**2).sum(axis=(0, 2, 3))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # constant images (one flat colour) must not cause a division by zero
    return [round(float(m), 6) for m in mean], [round(max(float(s), 1e-3), 6) for s in std]
