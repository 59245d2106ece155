"""From data sources to prepared images: choose, decode once, hold out a test and a validation part, digest.

An image is identified by its pixels. Prepared images stand in the order of their identities, so the same images give
the same result from a folder, a table, an archive or a data set.

Labels are read for one purpose: parts that are held out are balanced over classes. They are not stored here.
`lgp.data.labels` reads them again.
"""

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lgp.compute.seals import seal
from lgp.data.held_out import Draw, HeldOut, draw_held_out, read_held_out
from lgp.data.label_notes import notes_on_equal_pixels, notes_on_names
from lgp.data.leaks import find_leaks
from lgp.data.sources.offers import Offers, Skipped
from lgp.data.sources.opening import open_sources, said
from lgp.data.sources.states import STATE, images_state
from lgp.data.splits import cap, notes_on_classes
from lgp.data.statistics import of_stored, of_sums
from lgp.data.stored import ARRAY, INDEX, META, PARTS, StoredImages, shards_in
from lgp.data.writing import Stored, store
from lgp.errors import LgpError
from lgp.params.data import DataParams

NOT_MEASURED = {"test": "accuracy is not measured", "val": "nothing can be chosen by validation"}
SKIPPED = "skipped.csv"
SAID = 3  # of these a run prints
SHOWN = 100  # skipped files that the metrics list; SKIPPED has all
FEW_FILES = 3  # so many unreadable files are no reason to stop, whatever their share


def prepare(
    params: DataParams, seed: int, folder: Path, held_out: Path, work: Path | None = None
) -> tuple[dict[str, Any], HeldOut]:
    """Write prepared images into the empty, existing `folder`. Return its metrics, and which images are held out.

    Args:
        params: the section `data`.
        seed: the run's seed. It decides the held-out parts.
        folder: where to write.
        held_out: the file of the images that are held out. It need not exist.
        work: where the work of a killed run is kept. The caller removes it at the end. None: it is not kept.

    Returns:
        Counts per part, the digest, what is to be told, and what was skipped with path and reason.

    Raises:
        LgpError: there is no such source, it holds no image, or too many files are unreadable.
    """
    offers = open_sources(params.source, params.columns, params.labels)
    state = images_state(offers, params.noticed_by, params.source)
    labels = class_indices(offers)
    given = given_parts(offers, labels)
    if faults := faults_of(offers, labels, given):
        raise LgpError("; ".join(faults))
    draw = Draw(seed, params.test_share, params.val_share)
    before, notes = _held_before(held_out, draw, offers, labels)
    notes = [*offers.notes, *notes]
    keep = partial(_within_caps, offers, labels, given, params, seed)
    pieces = (work or folder) / f"pieces-{state[-16:]}"
    positions = keep(before)
    index, stored = _read(offers, positions, params, pieces, folder)
    kept, of_parts = _held_out(index, labels, given, before, offers, held_out)
    if (again := keep(kept)) != positions:
        # whole groups were drawn, or images that are held out have other paths now
        positions = again
        index, stored = _read(offers, positions, params, pieces / "with-held-out", folder)
        kept, _ = _held_out(index, labels, given, kept, offers, held_out)
    if work is None:
        shutil.rmtree(pieces)
    order, sums = index.pop("position").to_numpy(), index.pop("sums")
    notes += of_parts
    index["part"] = _parts(index, given[order], kept, notes)
    if params.drop_near_test_bits is not None:
        _drop_near_test(index, labels[order], params.drop_near_test_bits)
    counts = {name: int((labels[order] == c).sum()) for c, name in enumerate(offers.classes)}
    unlabelled = int(((index["part"] == "train") & (labels[order] < 0)).sum())
    if unlabelled:
        notes.append(f"{unlabelled} unlabeled images of train serve pre-training only")
    dropped = int((given == "dropped").sum())
    if dropped:
        notes.append(f"{dropped} images of test or val have no label: they are not used")
    if len(positions) < len(offers):
        notes.append(f"{len(offers) - len(positions)} images are left out by data.max_train_images or max_test_images")
    notes += notes_on_classes(counts, bool(kept.images or kept.groups))
    notes += notes_on_names(offers.labels)
    notes += notes_on_equal_pixels(index["content"].tolist(), labels[order].tolist(), index["path"].tolist())
    index.to_parquet(folder / INDEX, index=False)
    skipped = [*stored.unreadable, *offers.skipped, *offers.clutter]
    _write_skipped(folder / SKIPPED, skipped)
    found = index["part"].value_counts()
    digest = _write_meta(folder, index, sums, params)
    seal(folder)
    (folder / STATE).write_text(f"{state}\n", encoding="utf-8")  # not sealed: it changes with labels in the same file
    return {
        **{f"images/{part}": int(found.get(part, 0)) for part in PARTS},
        "unreadable": [skip._asdict() for skip in stored.unreadable[:SHOWN]],
        "unreadable_share": round(len(stored.unreadable) / (len(index) + len(stored.unreadable)), 6),
        "skipped": [skip._asdict() for skip in [*offers.skipped, *offers.clutter][:SHOWN]],
        "skipped_files": len(skipped),
        "notes": notes,
        "digest": digest,
    }, kept


def describe(metrics: dict[str, Any]) -> list[str]:
    """Return what `prepare` found, a line each."""
    counts = ", ".join(f"{metrics[f'images/{part}']} {part}" for part in PARTS)
    lines = [f"{counts} images", *metrics["notes"]]
    listed = [*metrics["unreadable"], *metrics["skipped"]]
    if listed:
        said = _examples([Skipped(**skip) for skip in listed])
        lines.append(f"left out {metrics['skipped_files']} files and rows: {said}: data/prepared/{SKIPPED} lists all")
    return lines


def _examples(skipped: Sequence[Skipped]) -> str:
    """Return some of what was left out, of different reasons where there are several."""
    first_of_reason = list({skip.reason: skip for skip in reversed(skipped)}.values())[::-1]
    examples = list(dict.fromkeys([*first_of_reason, *skipped]))[:SAID]
    return "; ".join(f"{path} ({reason})" for path, reason in examples) + ("; …" if len(skipped) > SAID else "")


def _read(
    offers: Offers, positions: list[int], params: DataParams, pieces: Path, folder: Path
) -> tuple[pd.DataFrame, Stored]:
    """Store these images in the folder. Return a row per image, in the order of the identities, and what was stored.

    Args:
        offers: the source.
        positions: of the images to store.
        params: the section `data`.
        pieces: where the work of a killed run is kept.
        folder: where to write. Images that it has are removed.

    Raises:
        LgpError: too many files are unreadable.
    """
    pieces.mkdir(parents=True, exist_ok=True)
    for earlier in [folder / ARRAY, *shards_in(folder)]:
        earlier.unlink(missing_ok=True)
    stored = store(offers, positions, params, pieces, folder)
    try:
        _check_readable(stored, offers, params)
    except LgpError:
        shutil.rmtree(pieces)  # so that files which are mended are read again
        raise
    return _index(stored, offers), stored


def class_indices(offers: Offers) -> np.ndarray:
    """Return the class index of each offered image, (N,), -1 without a label."""
    number = {name: i for i, name in enumerate(offers.classes)}
    return np.array([-1 if label is None else number[label] for label in offers.labels], dtype=np.int64)


def given_parts(offers: Offers, labels: np.ndarray) -> np.ndarray:
    """Return the parts that the source gives, (N,): train, val, test or dropped.

    Without a labelled test image, a labelled validation part takes the place of the test part. Images of test and val
    that have no labels (ImageNet-1k's test, for example) are then dropped. They never serve training.
    """
    splits = np.array(offers.splits, dtype=object)
    labelled = {part: labelled_of(offers, labels, part) for part in ("test", "val")}
    for part in ("test", "val"):
        if not labelled[part]:
            splits[splits == part] = "dropped"
    if labelled["val"] and not labelled["test"]:
        splits[splits == "val"] = "test"
    return splits


def faults_of(offers: Offers, labels: np.ndarray, given: np.ndarray) -> list[str]:
    """Return why a source cannot be prepared, a line each: no images, classes that train lacks, crossing groups.

    Args:
        offers: the source.
        labels: (N,) class indices, -1 where unlabelled.
        given: (N,) train, val, test or dropped.
    """
    if not len(offers):
        few = "; ".join(f"{skip.path} ({skip.reason})" for skip in offers.skipped[:3])
        hint = f": left out {few}; paths of a table start at its folder, or at `root`" if few else ""
        return [f"the data source holds no image at all{hint}"]
    faults = []
    if not (given == "train").any():
        there = ", ".join(sorted(set(offers.splits)))
        faults.append(f"the data source has images of {there}, none to train on: add a folder `train`")
    train = set(labels[given == "train"])
    for part in ("test", "val"):
        unknown = sorted(offers.classes[c] for c in set(labels[(given == part) & (labels >= 0)]) - train)
        if unknown and train - {-1}:
            faults.append(f"{part} has classes that train lacks: {', '.join(unknown)}; rename or remove them")
    parts_of: dict[str, set[str]] = {}
    for group, part in zip(offers.groups, given.tolist(), strict=True):
        if group is not None:
            parts_of.setdefault(group, set()).add(part)
    crossing = sorted(group for group, parts in parts_of.items() if len(parts) > 1)
    if crossing:
        parts = ", ".join(sorted(parts_of[crossing[0]]))
        faults.append(
            f"{len(crossing)} groups have images in several parts, as {crossing[0]} ({parts}): a group is of one part, "
            "mend the column of splits or the one of groups"
        )
    return faults


def _within_caps(
    offers: Offers, labels: np.ndarray, given: np.ndarray, params: DataParams, seed: int, held_out: HeldOut
) -> list[int]:
    """Return the positions of the images to keep. Unlabelled images are training images.

    Images that are held out of train are all kept. They are known by their paths and groups here, as nothing is
    decoded yet.
    """
    kept = np.ones(len(offers), dtype=bool)
    held = held_out.holds(offers.paths, offers.groups)
    shares = [s for part, s in (("test", params.test_share), ("val", params.val_share)) if not (given == part).any()]
    for part, most in (("train", params.max_train_images), ("test", params.max_test_images)):
        rows = np.flatnonzero(given == part)
        if most is not None and len(rows) > most:
            of_part = (held[rows], shares) if part == "train" else ()
            kept[rows] = cap(labels[rows], [offers.paths[i] for i in rows], most, seed, part, *of_part)
    return np.flatnonzero(kept).tolist()


def _check_readable(stored: Stored, offers: Offers, params: DataParams) -> None:
    unreadable, total = stored.unreadable, len(stored.table) + len(stored.unreadable)
    if not total:
        raise LgpError("the data source holds no image at all")
    share = len(unreadable) / total
    if len(unreadable) == total or (len(unreadable) > FEW_FILES and share > params.max_unreadable_share):
        few = "; ".join(f"{skip.path} ({skip.reason})" for skip in unreadable[:3]) + (
            "; …" if len(unreadable) > 3 else ""
        )
        raise LgpError(
            f"{len(unreadable)} of {total} files of {said(params.source)} cannot be read, {share:.1%}, more than "
            f"data.max_unreadable_share {params.max_unreadable_share:.1%}: {few}; "
            "remove them, or raise that share; paths of a table start at its folder, or at `root`"
        )


def _index(stored: Stored, offers: Offers) -> pd.DataFrame:
    """Return a row per image, in the order of the identities. `row` is its place in the store."""
    order = stored.table["position"].to_numpy()
    index = stored.table.assign(
        path=[offers.paths[i] for i in order],
        group=pd.array([offers.groups[i] for i in order], dtype="string"),
        row=np.arange(len(order)),
    )
    return index.sort_values(["content", "path"], kind="stable", ignore_index=True)


def _held_before(file: Path, draw: Draw, offers: Offers, labels: np.ndarray) -> tuple[HeldOut, list[str]]:
    """Return what the file has, with the present role of a given validation part, and what is to be told of the role.

    Choices are made on val. Images that were test and are val now have no unseen accuracy any more, and conversely.
    """
    before, notes = read_held_out(file, draw), []
    labelled = {part: labelled_of(offers, labels, part) for part in ("test", "val")}
    val_is_test = bool(labelled["val"] and not labelled["test"])
    if before is not None and before.val_is_test and labelled["test"]:
        notes.append(
            f"val of the source stood for test before, and test has labels now: its {labelled['test']} images are "
            f"test, the {labelled['val']} of val are validation images; earlier results are of other test images"
        )
    elif before is not None and val_is_test and not before.val_is_test:
        notes.append(
            f"val of the source stands for test now, as test has no labels: its {labelled['val']} images are test, "
            "and earlier choices may have been made on them"
        )
    return replace(before or HeldOut(draw), val_is_test=val_is_test), notes


def labelled_of(offers: Offers, labels: np.ndarray, split: str) -> int:
    """Return the number of labelled images that the source gives to a split."""
    return int(((np.array(offers.splits, dtype=object) == split) & (labels >= 0)).sum())


def _held_out(
    index: pd.DataFrame, labels: np.ndarray, given: np.ndarray, before: HeldOut, offers: Offers, file: Path
) -> tuple[HeldOut, list[str]]:
    """Return what is held out, as the file has it, the rest drawn, and what is to be told of it.

    Args:
        index: of the images that were read, with their positions.
        labels: (N,) of all images of the source.
        given: (N,) their parts.
        before: what is held out already.
        offers: the source.
        file: where it is kept.
    """
    order, notes = index["position"].to_numpy(), []
    identities, groups = identities_of(index), groups_of(index)
    wanted = set(before.images) | {f"group {group}" for group in before.groups}
    there = wanted & (set(identities) | {f"group {group}" for group in groups if group is not None})
    if wanted and not there:
        notes.append(f"{file} is of other images: test and validation images are drawn anew")
        before = HeldOut(before.draw, val_is_test=before.val_is_test)
    elif wanted != there:
        gone = len(wanted - there)
        notes.append(
            f"{gone} of {len(wanted)} images and groups that are held out were not found: they left the source, cannot "
            "be read, or have other paths while data.max_train_images leaves images out"
        )
    kept = draw_held_out(before, identities, labels[order], groups, given[order])
    return kept.found(identities, index["path"].tolist(), offers.paths), notes


def identities_of(index: pd.DataFrame) -> list[str]:
    """Return the identity of each image, as text: the first half of the digest of its pixels."""
    return [content[:16].hex() for content in index["content"]]


def groups_of(index: pd.DataFrame) -> list[str | None]:
    """Return the group of each image, None where it has none."""
    return [None if pd.isna(group) else str(group) for group in index["group"]]


def _parts(index: pd.DataFrame, given: np.ndarray, held_out: HeldOut, notes: list[str]) -> np.ndarray:
    """Return the part of each image, (N,): train (labelled or not), val, test, or dropped."""
    drawn = held_out.parts(identities_of(index), groups_of(index))
    parts = np.where(given == "train", drawn, given)
    for part in ("test", "val"):
        if not (parts == part).any():
            notes.append(f"no {part} image: {NOT_MEASURED[part]}")
    return parts


def _drop_near_test(index: pd.DataFrame, labels: np.ndarray, bits: int) -> None:
    """Drop the images of train and val that also occur in test, exactly or nearly.

    Raises:
        LgpError: a class is left without an image in train or val.
    """
    parts, kept = index["part"].to_numpy(copy=True), ("train", "val")
    before = {part: set(labels[(parts == part) & (labels >= 0)]) for part in kept}
    is_test = parts == "test"
    content, hashes = index["content"].to_numpy(), index["hash"].to_numpy(dtype=np.uint64)
    _, in_test = find_leaks(content, hashes, np.flatnonzero(is_test), np.flatnonzero(~is_test), bits)
    parts[in_test] = "dropped"
    for part in kept:
        if before[part] - set(labels[parts == part]):
            raise LgpError(
                f"data.drop_near_test_bits {bits} leaves a class without an image in {part}: lower it, or set it to "
                "null and look at the leaks in metrics/labels.json"
            )
    index["part"] = parts


def _write_skipped(file: Path, skipped: Sequence[Skipped]) -> None:
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(Skipped._fields)
        writer.writerows(skipped)


def _write_meta(folder: Path, index: pd.DataFrame, sums: pd.Series, params: DataParams) -> str:
    """Write the properties common to all images, and a digest of everything prepared. Return the digest.

    `sums` are those of each image, as `Stored` has them.

    The digest is of pixels, parts and statistics. Where the images came from does not change it.
    """
    meta: dict[str, Any] = {
        "image_size": params.image_size,
        "channels": params.channels,
        "eval_crop": params.eval_crop,
        "mean": params.mean,
        "std": params.std,
    }
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")
    if params.mean is None or params.std is None:
        of_train = [of_image for of_image in sums[index["part"] == "train"] if of_image]
        mean, std = of_sums(of_train, params.image_size**2) if of_train else of_stored(StoredImages(folder))
        meta |= {"mean": params.mean or mean, "std": params.std or std}
    digest = hashlib.sha256(b"".join(index["content"]))
    digest.update(index[["height", "width", "part"]].to_csv(index=False).encode())
    digest.update(json.dumps(meta, sort_keys=True).encode())
    if not (folder / ARRAY).exists():
        digest.update(b"encoded")  # crops of an array differ by rounding
    meta["digest"] = digest.hexdigest()
    (folder / META).write_text(json.dumps(meta, indent=2), encoding="utf-8")
    return digest.hexdigest()
