"""The few-label subsets on disk: lists of image ids by name. Light: it imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lgp.compute.intact import read_json
from lgp.compute.seals import check_sealed
from lgp.errors import LgpError

SUBSETS = "subsets.json"
REMEDY = "run `lgp labels`"

Subsets = Mapping[str, list[list[int]]]


def save_subsets(folder: Path, subsets: Subsets) -> None:
    """Write all subsets: name → lists of ids."""
    (folder / SUBSETS).write_text(json.dumps(subsets), encoding="utf-8")


def load_subsets(folder: Path, name: str) -> list[np.ndarray]:
    """Return the subsets of one name, each a sorted array of ids.

    Raises:
        LgpError: `folder` has no labels, damaged ones, or no subsets of that name. The message lists the existing
            names.
    """
    subsets = _read_subsets(folder)
    if name not in subsets:
        raise LgpError(
            f"no few-label subsets {name!r}: there are {', '.join(subsets)}; add it to labels.shares, labels.shots "
            "or labels.lists and run `lgp labels` again"
        )
    return [np.array(ids, dtype=np.int64) for ids in subsets[name]]


def names_of_same_subsets(folder: Path, name: str) -> list[str]:
    """Return the names whose subsets are those of `name`, in order, itself included; an unknown name gives none."""
    subsets = _read_subsets(folder)
    return [other for other in subsets if name in subsets and subsets[other] == subsets[name]]


def _read_subsets(folder: Path) -> Subsets:
    if not (folder / SUBSETS).exists():
        raise LgpError(f"no labels in {folder}: run `lgp labels` first")
    check_sealed(folder, REMEDY, [SUBSETS])
    subsets: Subsets = read_json(folder / SUBSETS, dict[str, list[list[int]]], REMEDY)
    return subsets
