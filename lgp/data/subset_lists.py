"""Published few-label subsets. A file has one image per line: its path or name, with or without its label."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lgp.data.sources.cells import text_of
from lgp.data.sources.states import list_file
from lgp.errors import LgpError

SHOWN = 5  # names in a message
LABELLED = re.compile(r"(.*\S)\s*[,\s]\s*(\S+)")


def read_subset_list(
    path: Path, paths: Sequence[str], labels: np.ndarray, splits: Sequence[str], classes: Sequence[str]
) -> np.ndarray:
    """Read a list and find its images.

    A name fits an image whose path ends in it, at a folder's boundary. A label may follow the name, after blanks or a
    comma. It is the name or the number of a class. It must be the image's label.

    Args:
        path: of the list.
        paths: of all images, within their source.
        labels: (N,) their class indices.
        splits: split of each image. Only images of `train` may be listed.
        classes: class names.

    Returns:
        Sorted positions, one for each line.

    Raises:
        LgpError: the file is missing or empty; a line has no name; a name is unknown, ambiguous, repeated or not of a
            training image; a label is not the image's; or a class has no image. The message names them.
    """
    file = list_file(path)
    try:
        text = text_of(file.read_bytes())
    except (OSError, ValueError) as e:
        raise LgpError(
            f"cannot read the list of images {file.absolute()} ({getattr(e, 'strerror', None) or e}): mend "
            "labels.lists, or the file"
        ) from None
    lines = [(number, line.strip(", \t")) for number, line in enumerate(text.splitlines(), 1) if line.strip(", \t")]
    if not lines:
        raise LgpError(f"{path} names no image: give one path or file name a line")
    found, faults = _look_up(lines, paths, labels, classes)
    counts = np.bincount(found, minlength=len(paths)) if found else np.zeros(len(paths), dtype=np.int64)
    faults["repeated"] = [paths[i] for i in np.flatnonzero(counts > 1).tolist()]
    faults["not of the training part"] = [
        f"{paths[i]} ({splits[i]})" for i in sorted(set(found)) if splits[i] != "train"
    ]
    if not any(faults.values()):
        given = set(labels[found].tolist())
        faults["classes without an image"] = [name for label, name in enumerate(classes) if label not in given]
    if any(faults.values()):
        said = "; ".join(f"{what}: {_few(names)}" for what, names in faults.items() if names)
        raise LgpError(f"{path} does not fit the images of data.source: {said}: mend the list")
    return np.array(sorted(found), dtype=np.int64)


def _look_up(
    lines: list[tuple[int, str]], paths: Sequence[str], labels: np.ndarray, classes: Sequence[str]
) -> tuple[list[int], dict[str, list[str]]]:
    by_name: dict[str, list[int]] = defaultdict(list)
    for i, image in enumerate(paths):
        by_name[image.rsplit("/", 1)[-1]].append(i)

    def fitting(name: str) -> list[int]:
        return [i for i in by_name[name.rsplit("/", 1)[-1]] if f"/{paths[i]}".endswith(f"/{name}")]

    found: list[int] = []
    faults: dict[str, list[str]] = {
        "lines without a name": [],
        "unknown": [],
        "fitting several images": [],
        "another label than the image's": [],
    }
    for number, line in lines:
        name, label, fits = line, "", fitting(line)
        if not fits:  # the label is split off only now: names of images and classes may contain blanks and commas
            ends = [c for c in classes if line.endswith((f" {c}", f",{c}", f"\t{c}"))]
            labelled = LABELLED.fullmatch(line)
            label = max(ends, key=len) if ends else labelled[2] if labelled else ""
            name = line.removesuffix(label).rstrip(", \t")
            fits = fitting(name) if name else []
        if not fits and (line in classes or line.isdecimal()):
            faults["lines without a name"].append(f"line {number}")
        elif len(fits) != 1:
            faults["fitting several images" if fits else "unknown"].append(line)
        else:
            found.append(fits[0])
            of_image = labels[fits[0]]
            # a label may be both the name of one class and the number of another: the name has priority
            says = classes.index(label) if label in classes else int(label) if label.isdecimal() else -1
            if label and of_image >= 0 and says != of_image:
                faults["another label than the image's"].append(f"{line} (the image's is {classes[of_image]})")
    return found, faults


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
