"""The few-label subsets on disk: lists of image ids by name. Light: it imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lgp.errors import LgpError

SUBSETS = "subsets.json"

Subsets = Mapping[str, list[list[int]]]


def save_subsets(folder: Path, subsets: Subsets) -> None:
    """Write all subsets: name → lists of ids."""
    (folder / SUBSETS).write_text(json.dumps(subsets))


def load_subsets(folder: Path, name: str) -> list[np.ndarray]:
    """Return the subsets of one name, each a sorted array of ids.

    Raises:
        LgpError: `folder` has no labels, or no subsets of that name. The message lists the existing names.
    """
    path = folder / SUBSETS
    if not path.exists():
        raise LgpError(f"no labels in {folder}: run `lgp labels` first")
    subsets = json.loads(path.read_text())
    if name not in subsets:
        raise LgpError(
            f"no few-label subsets {name!r}: there are {', '.join(subsets)}; add it to labels.shares, labels.shots "
            "or labels.lists and run `lgp labels` again"
        )
    return [np.array(ids, dtype=np.int64) for ids in subsets[name]]


def names_of_same_subsets(folder: Path, name: str) -> list[str]:
    """Return the names whose subsets are those of `name`, in order, itself included; an unknown name gives none."""
    subsets = json.loads((folder / SUBSETS).read_text())
    return [other for other in subsets if name in subsets and subsets[other] == subsets[name]]
