"""Folders whose files and classes have any name that a file system takes."""

import csv
import os
import random
from collections.abc import Callable
from pathlib import Path

from sources import picture, prepare
from tried import Tried, Wrong, tried

ALPHABETS = {
    "markup": "<>&\"'$\\{}[]()^_#%*?!|~`=+;:,@ .-",
    "control": "".join(map(chr, [*range(1, 32), 127, 0x85, 0x2028, 0x2029, 0xFEFF])),
    "scripts": "äßéñ猫犬русعربيעברไทย한국e\u0301a\u030a\u200d\u202e🐈👩‍🔬🏳️‍🌈ﬁ①ﬃİıſK",
    "bytes": "",
}
OF_CLASS = 5  # images
LONGEST = 255  # bytes, of a name in most file systems


def _name(rng: random.Random, alphabet: str) -> str:
    """Draw a name: bytes that need not be UTF-8, or text of an alphabet and letters."""
    longest = rng.choice((1, 3, 12, 60, LONGEST))
    if alphabet == "bytes":
        raw = bytes(rng.choice([b for b in range(1, 256) if b != ord("/")]) for _ in range(longest))
    else:
        letters = ALPHABETS[alphabet] + "aB1"
        raw = "".join(rng.choice(letters) for _ in range(longest)).encode()[:LONGEST].decode("utf-8", "ignore").encode()
    name = os.fsdecode(raw)
    return "x" if name in ("", ".", "..") else name


def attack(rng: random.Random, folder: Path) -> Tried:
    """Make a folder of classes, and prepare it: every image arrives, in its class."""
    alphabet = rng.choice(list(ALPHABETS))
    source = folder / "source"
    classes = {_name(rng, alphabet) for _ in range(rng.choice((2, 3)))}
    count = 0
    for name in classes:
        (source / "train" / name).mkdir(parents=True, exist_ok=True)
        for number in range(OF_CLASS):
            stem = os.fsdecode(os.fsencode(_name(rng, alphabet))[: LONGEST - 6])
            (source / "train" / name / f"{stem}{number}.png").write_bytes(picture(rng))
            count += 1
    drawn = rng.random() < 0.3

    def work() -> None:
        from lgp.report.figures import plot_confusion  # names are drawn

        images = prepare(str(source), folder)
        told = _skipped(folder / "prepared" / "skipped.csv")
        if len(images.paths) + told != count:
            raise Wrong(f"{count} images, {len(images.paths)} arrived, {told} are listed as skipped")
        if len(images.paths) == count and len(images.classes) not in (0, len(classes)):
            raise Wrong(f"classes {sorted(classes)} became {images.classes}")
        if drawn:
            _draw(plot_confusion, folder, list(images.classes))

    return tried(alphabet, work, folder)


def _skipped(file: Path) -> int:
    """Return how many images a list of skipped files and folders stands for: a hidden folder is a class."""
    with file.open(encoding="utf-8", newline="") as rows:
        return sum(1 if row["path"].endswith(".png") else OF_CLASS for row in csv.DictReader(rows))


def _draw(plot: Callable[..., None], folder: Path, classes: list[str]) -> None:
    """Draw the names of classes into a picture."""
    import numpy as np
    import pandas as pd

    rows = np.arange(20)
    if classes:
        label = rows % len(classes)
        plot(folder / "confusion.png", pd.DataFrame({"label": label, "prediction": label, "subset": 0}), classes)
