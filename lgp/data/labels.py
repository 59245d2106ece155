"""Labels, stored apart from images: classes, label and split of each image, and few-label subsets.

| file | content |
|---|---|
| `labels.parquet` | a row per prepared image: label (-1 without one) and split |
| `subsets.json` | the few-label subsets, as lists of image ids |
| `meta.json` | class names, a digest of everything |
| `digests.json` | digests of these files, which are compared when the folder is opened |

A changed label, subset or list changes these files and no prepared image. Evaluations then run again. Trainings do not.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel

from lgp.compute.intact import read_json, read_parquet
from lgp.compute.seals import check_sealed, seal
from lgp.data.label_notes import notes_on_equal_pixels, notes_on_names
from lgp.data.leaks import EXACT, Leak, find_leaks
from lgp.data.preparation import class_indices, faults_of, given_parts, groups_of, identities_of
from lgp.data.published_lists import check_published
from lgp.data.sources.offers import Offers
from lgp.data.sources.opening import open_sources
from lgp.data.sources.states import STATE, is_state, labelling_state
from lgp.data.splits import few_names
from lgp.data.storage import Images
from lgp.data.subset_files import REMEDY, SUBSETS, Subsets, load_subsets, names_of_same_subsets, save_subsets
from lgp.data.subset_lists import read_subset_list
from lgp.data.subsets import few_label_subsets
from lgp.errors import LgpError
from lgp.params.data import DataParams
from lgp.params.labels import ALL_LABELS, LabelsParams, shot_name

TABLE, META = "labels.parquet", "meta.json"
SPLITS = ("train", "unlabeled", "val", "test", "dropped")
SHOWN_LEAKS = 100  # listed with names; all leaks are counted


class LabelsMeta(BaseModel):
    """What `meta.json` has. `images` is the digest of the images that the labels are of."""

    classes: list[str]
    images: str
    digest: str


def write_labels(params: LabelsParams, data: DataParams, images: Images, seed: int, folder: Path) -> dict[str, Any]:
    """Write labels and few-label subsets of prepared images into the existing `folder`. Return their metrics.

    Args:
        params: the section `labels`.
        data: `data.source` and `data.columns`. The labels are read again.
        images: the images prepared from that source.
        seed: the run's seed. It decides the subsets.
        folder: where to write.

    Returns:
        Counts per split and subset, the number of classes, what is to be told, the digest, and the leaks.

    Raises:
        LgpError: the images of the source are not those that were prepared, a list does not fit, or a class has too
            few images.
    """
    offers = open_sources(data.source, data.columns, data.labels)
    labels, classes, notes = _labels_of(images, offers, data)
    splits = np.where((images.parts == "train") & (labels < 0), "unlabeled", images.parts).astype(object)
    splits[np.isin(images.parts, ("val", "test")) & (labels < 0)] = "dropped"
    lists = _read_lists(params, images.paths, labels, splits, classes)
    splits[[i for rows in itertools.chain.from_iterable(lists.values()) for i in rows]] = "train"
    leaks = _find_leaks(images, params.near_duplicate_bits)
    if params.leaks == "drop_test":
        _drop_test(splits, labels, leaks)
    train = np.flatnonzero(splits == "train")
    identities, groups = identities_of(images.index), groups_of(images.index)
    drawn = few_label_subsets(
        labels[train], [identities[i] for i in train], params, seed, classes, [groups[i] for i in train]
    )
    subsets = {name: [train[rows].tolist() for rows in subsets] for name, subsets in drawn.items()} | lists
    digest = _write(folder, pd.DataFrame({"label": labels, "split": splits}), subsets, classes, images)
    lists_read = [file for files in params.lists.values() for file in files]
    seal(folder, [TABLE, SUBSETS, META])
    (folder / STATE).write_text(f"{labelling_state(offers, lists_read)}\n", encoding="utf-8")
    return {
        **{f"images/{split}": int((splits == split).sum()) for split in SPLITS},
        "classes": len(classes),
        **{f"labels/{name}": len(of_name[0]) for name, of_name in subsets.items()},
        "leaks/exact": sum(leak.bits == EXACT for leak in leaks),
        "leaks/near": sum(leak.bits != EXACT for leak in leaks),
        "leaks": [_described(leak, images.paths) for leak in leaks[:SHOWN_LEAKS]],
        "notes": notes,
        "digest": digest,
    }


def _labels_of(images: Images, offers: Offers, data: DataParams) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the label of each prepared image, (N,), as the source has it now, the classes, and what is to be told.

    A class is one that a training image has.

    Raises:
        LgpError: the images of the source are not those that were prepared, given parts contradict the labels, or
            there is only one class.
    """
    of_offers = class_indices(offers)
    by_path = dict(zip(offers.paths, of_offers.tolist(), strict=True))
    _check_same_images(images, offers, data)
    if faults := faults_of(offers, of_offers, given_parts(offers, of_offers)):
        raise LgpError("; ".join(faults))
    labels = np.array([by_path[path] for path in images.paths], dtype=np.int64)
    there = np.unique(labels[(images.parts == "train") & (labels >= 0)])
    classes = [offers.classes[c] for c in there]
    if len(classes) == 1:
        raise LgpError(f"the only class is {classes[0]!r}: evaluation needs two or more, add images of another class")
    number = np.full(len(offers.classes) + 1, -1, dtype=np.int64)  # the last is for images without a label
    number[there] = np.arange(len(there))
    notes = [*_left_out(labels, images.parts, there, offers.classes), *notes_on_names(offers.labels)]
    notes += notes_on_equal_pixels(images.index["content"].tolist(), labels.tolist(), images.paths)
    return number[labels], classes, notes


def _check_same_images(images: Images, offers: Offers, data: DataParams) -> None:
    """Raise `LgpError` if the source has other images than those that were prepared, or other images by their names.

    Labels are found by the names of images. So the state of the source must be the one that `prepare` has noted.
    """
    offered = set(offers.paths)
    gone = [path for path in images.paths if path not in offered]
    if gone:
        more = f", nor {len(gone) - 1} other prepared images" if gone[1:] else ""
        raise LgpError(f"the source has no {gone[0]} any more{more}: run `lgp prepare`, or `dvc repro`")
    noted = images.folder / STATE
    if not noted.exists() or not is_state(
        noted.read_text(encoding="utf-8", errors="replace").strip(), offers, data.source
    ):
        raise LgpError(
            "the source has changed since its images were prepared (images, splits or groups; or the first labels, "
            f"from which on images can be held out), so labels may be of other images than those in {images.folder}: "
            "run `lgp prepare` first"
        )


def _left_out(labels: np.ndarray, parts: np.ndarray, there: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Say which labelled images of test and val are of classes that no training image has."""
    notes = []
    for part in ("test", "val"):
        lost = labels[(parts == part) & (labels >= 0) & ~np.isin(labels, there)]
        if len(lost):
            names = few_names([classes[c] for c in np.unique(lost)])
            notes.append(f"{len(lost)} images of {part} are not used: no training image has their class ({names})")
    return notes


def _read_lists(
    params: LabelsParams, paths: list[str], labels: np.ndarray, splits: np.ndarray, classes: list[str]
) -> dict[str, list[list[int]]]:
    """Read the published lists, and check those of known names. Listed images of val count as training images."""
    parts = np.where(splits == "val", "train", splits).tolist()
    lists = {
        name: [read_subset_list(Path(file), paths, labels, parts, classes).tolist() for file in files]
        for name, files in params.lists.items()
    }
    check_published(lists, params.lists, labels)
    return lists


def _find_leaks(images: Images, bits: int | None) -> list[Leak]:
    """Find the test images that also occur in train or val."""
    content, hashes = (images.index[column].to_numpy() for column in ("content", "hash"))
    leaks, _ = find_leaks(
        content,
        hashes.astype(np.uint64),
        images.ids("test"),
        np.flatnonzero(np.isin(images.parts, ("train", "val"))),
        bits,
    )
    return leaks


def _drop_test(splits: np.ndarray, labels: np.ndarray, leaks: Sequence[Leak]) -> None:
    """Remove the leaks from test. Raise `LgpError` if a class then has no test image."""
    before = set(labels[splits == "test"])
    splits[[leak.test for leak in leaks]] = "dropped"
    if before - set(labels[splits == "test"]):
        raise LgpError(
            "labels.leaks drop_test leaves a class without a test image: lower labels.near_duplicate_bits, or set "
            "labels.leaks to report and look at the leaks in metrics/labels.json"
        )


def _described(leak: Leak, paths: Sequence[str]) -> dict[str, str]:
    same = "the same pixels" if leak.bits == EXACT else f"near, {leak.bits} of 64 bits apart"
    return {"test": paths[leak.test], "also": paths[leak.learnt], "how": same}


def _write(folder: Path, table: pd.DataFrame, subsets: Subsets, classes: list[str], images: Images) -> str:
    table.to_parquet(folder / TABLE, index=False)
    save_subsets(folder, subsets)
    digest = hashlib.sha256(images.meta["digest"].encode())
    digest.update(table.to_csv(index=False).encode())
    digest.update(json.dumps([subsets, classes], sort_keys=True).encode())
    meta = {"classes": classes, "images": images.meta["digest"], "digest": digest.hexdigest()}
    (folder / META).write_text(json.dumps(meta, indent=2), encoding="utf-8")
    return digest.hexdigest()


def describe(metrics: dict[str, Any], params: LabelsParams) -> list[str]:
    """Return what `write_labels` found, a line each."""
    counts = ", ".join(f"{metrics[f'images/{split}']} {split}" for split in SPLITS[:-1])
    lines = [f"{counts} images in {metrics['classes']} classes", *metrics["notes"]]
    if metrics["leaks"]:
        kept = {"report": "which stay", "drop_test": "dropped from test"}[params.leaks]
        exact, near = metrics["leaks/exact"], metrics["leaks/near"]
        lines.append(f"{exact} test images also stand elsewhere, {near} nearly, {kept}: listed in metrics/labels.json")
    drawn = [name for name in (*params.shares, *map(shot_name, params.shots)) if f"labels/{name}" in metrics]
    for first, second in itertools.combinations(drawn, 2):
        # nested and balanced: as many images are the same images
        if metrics[f"labels/{first}"] == metrics[f"labels/{second}"]:
            images = metrics[f"labels/{first}"]
            lines.append(f"{first} and {second} are the same {images} images: keep one of them, or choose labels.shots")
    return lines


class LabelledImages(Images):
    """Prepared images with their labels, opened for reading. Evaluation reads them."""

    def __init__(self, images: Path, labels: Path) -> None:
        """Open both folders. Raise `LgpError` if one is missing or damaged, or if the labels are of other images."""
        super().__init__(images)
        if not (labels / META).exists():
            raise LgpError(f"no labels in {labels}: run `lgp labels` first")
        check_sealed(labels, REMEDY)
        self.labels_meta: dict[str, Any] = read_json(labels / META, LabelsMeta, REMEDY)
        if self.labels_meta["images"] != self.meta["digest"]:
            raise LgpError(f"the labels in {labels} are of other images than those in {images}: run `lgp labels` again")
        self._labels_folder = labels

    @cached_property
    def _table(self) -> pd.DataFrame:
        table: pd.DataFrame = read_parquet(self._labels_folder / TABLE, ["label", "split"], REMEDY).to_pandas()
        return table

    @property
    def classes(self) -> list[str]:
        """Class names; a label is an index into them."""
        return list(self.labels_meta["classes"])

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) class index per image, -1 where unlabelled."""
        return self._table["label"].to_numpy(dtype=np.int64)

    def ids(self, part: str) -> np.ndarray:
        """Return the sorted ids of `train` (labelled), `unlabeled`, `val` or `test`."""
        return np.flatnonzero(self._table["split"].to_numpy() == part)

    def check_evaluable(self) -> None:
        """Raise `LgpError` where nothing can be evaluated: without a label, or without a test or validation image."""
        if not self.classes:
            raise LgpError(
                "no image has a label, so nothing can be evaluated: `dvc repro mim cl graft` trains encoders without, "
                "`lgp labels add FILE` adds labels"
            )
        for split, share in (("test", "data.test_share"), ("val", "data.val_share")):
            if not len(self.ids(split)):
                raise LgpError(
                    f"no {split} image is held out, so nothing can be evaluated; encoders need none "
                    f"(`dvc repro mim cl graft`): set {share} above 0, or add labels"
                )

    def subsets(self, name: str) -> list[np.ndarray]:
        """Return the few-label subsets of one name, each a sorted array of ids; an unknown name raises `LgpError`."""
        return load_subsets(self._labels_folder, name)

    def names_of_same_subsets(self, name: str) -> list[str]:
        """Return the names whose subsets are those of `name`, in order, itself included. `all` gives itself alone."""
        if name == ALL_LABELS:
            return [ALL_LABELS]
        return names_of_same_subsets(self._labels_folder, name)

    def labelled(self, name: str) -> list[np.ndarray]:
        """Return the subsets `name`. For `all`, return the whole training part as the only subset."""
        return [self.ids("train")] if name == ALL_LABELS else self.subsets(name)
