"""Labels that are added later are kept under the name that the image has, whatever it is."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lgp.data.label_files import LABELS_FILE, added_labels, write_labels_file
from lgp.data.sources.offers import Columns
from lgp.data.sources.opening import open_sources
from lgp.errors import LgpError

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES.map(lambda name: os.fsencode(f"x{name}.png")), min_size=2, max_size=4, unique=True))
@example([b"z\xff.png", b"y.png"])
@example([b"a\\b.png", b"b.png"])
@example([b"line\nbreak.png", b"car\rriage.png", b" blank .png", b'quo"te,.png'])
@example(["\u00e9.png".encode(), "e\u0301.png".encode(), "\ufeff.png".encode(), "\u2028.png".encode()])
def test_every_name_of_an_image_is_found_again(names: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, file = Path(folder) / "raw", Path(folder) / LABELS_FILE
        root.mkdir()
        for name in names:
            with open(os.path.join(os.fsencode(root), name), "wb") as image:
                image.write(b"x")
        paths = open_sources([str(root)]).paths
        write_labels_file(file, {path: f"label of {i}" for i, path in enumerate(paths[:-1])})
        write_labels_file(file, {paths[-1]: "the last"})
        offers = open_sources([str(root)], None, [str(file)])
        assert offers.labels == [*(f"label of {i}" for i in range(len(paths) - 1)), "the last"]
        assert offers.skipped == []


def test_labels_of_another_project_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(b"x")
    offers = open_sources([str(tmp_path / "photos")])
    table = tmp_path / "selection.csv"
    table.write_text("path,label\nold_project/0.png,a\n")
    with pytest.raises(LgpError, match=r"1 of 1 rows name no image of data.source: old_project/0.png"):
        added_labels(offers, table, Columns())
    table.write_text("path,label\nphotos/0.png,a\n")
    assert added_labels(offers, table, Columns()).labels == {"0.png": "a"}
