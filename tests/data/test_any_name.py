"""Whatever the names of classes and images are, every image arrives, in its class."""

import os
import tempfile
import unicodedata
from pathlib import Path

import yaml
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_sources import images_from, labels_from, png

from lgp.data.sources.cells import is_clutter, printable
from lgp.data.sources.opening import open_sources
from lgp.params.file import Params

LONGEST = 255  # bytes
PICTURE = png()


def is_name(name: bytes) -> bool:
    """Whether a file system takes a name, and it is that of a file to see, and of no part of the data."""
    text = os.fsdecode(name)
    usual = {"train", "test", "val", "valid", "validation", "training", "testing", "dev", "unlabeled", "unlabelled"}
    return 0 < len(name) <= LONGEST and text[0] != "." and not is_clutter(text) and text.strip().lower() not in usual


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=80).map(os.fsencode)
BYTES = st.binary(min_size=1, max_size=20).map(lambda data: data.replace(b"/", b"_").replace(b"\0", b"_"))
MARKUP = st.text("<>&\"'$\\{}[]()^_#%*?!|~`=+;:,@ .-", min_size=1, max_size=20).map(os.fsencode)
CLASSES = st.lists((TEXT | BYTES | MARKUP).filter(is_name), min_size=2, max_size=3, unique=True)


def written(root: Path, classes: list[bytes], count: int) -> None:
    """Write that many images a class."""
    for name in classes:
        folder = os.path.join(os.fsencode(root), b"train", name)
        os.makedirs(folder)
        for number in range(count):
            with open(os.path.join(folder, name[: LONGEST - 5] + b"%d.png" % number), "wb") as file:
                file.write(PICTURE)


@settings(max_examples=80, deadline=None)
@given(CLASSES)
@example([b"\xff", b"\xfe"])
@example(["é".encode(), "e\u0301".encode(), b"e"])
@example([b"$x$", b"<b>", b"a\nb"])
@example([b"n" * LONGEST, ("é" * 127).encode()])
def test_every_image_of_any_folder_is_offered_in_its_class(classes: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written(Path(folder), classes, 2)
        offers = open_sources([folder])
        assert [skipped.reason for skipped in offers.skipped] == []
        assert len(set(offers.paths)) == 2 * len(classes)
        read = [reading() for reading in offers.reads(range(len(offers)))]
        assert read == [PICTURE] * len(offers)
    shown = {unicodedata.normalize("NFC", printable(os.fsdecode(name))) for name in classes}
    assert {unicodedata.normalize("NFC", label) for label in offers.labels if label is not None} == shown


@settings(max_examples=4, deadline=None)
@given(CLASSES)
@example([b"\xff", b"a\nb", "猫🐈".encode()])
def test_images_of_any_names_are_prepared_and_labelled(classes: list[bytes]) -> None:
    params = Params.model_validate(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        written(root / "raw", classes, 6)
        _, images = images_from(root / "raw", root / "prepared", params)
        _, data = labels_from(root / "raw", images, root / "labels", params, shares={"50pct": 0.5})
        assert len(data.paths) == 6 * len(classes)
        assert len(data.classes) == len({unicodedata.normalize("NFC", printable(os.fsdecode(n))) for n in classes})
        for file in root.rglob("*.json"):
            file.read_text(encoding="utf-8")
