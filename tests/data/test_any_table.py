"""Whatever a table of images contains, it is read, or told with its name; no row leads out of its folder."""

import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_sources import png

from lgp.data.sources.opening import open_sources
from lgp.errors import LgpError

NAMES = ("a/0.png", "a/1.png", "b/2.png")
SECRET = "secret.png"
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PATHS = st.sampled_from([*NAMES, f"../{SECRET}", f"a/../../{SECRET}", "a", ".", "", "nothing.png", "\0"])
COLUMNS = st.sampled_from(["path", "label", "split", "group", "image", "Label ", "", "é"])
ROWS = st.lists(st.dictionaries(COLUMNS, PATHS | TEXT | st.none(), min_size=1), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | PATHS | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32-le", "utf-7"])


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, dict.fromkeys(name for row in rows for name in row), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def some_table(write: Callable[[pa.Table, Any], None]) -> bytes:
    buffer = io.BytesIO()
    write(pa.table({"path": NAMES, "label": ["a", "a", "b"], "split": ["train", "test", "train"]}), buffer)
    return buffer.getvalue()


PARQUET = some_table(pq.write_table)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images in a folder, and another image beside it."""
    root = tmp_path_factory.mktemp("any") / "images"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    (root.parent / SECRET).write_bytes(png())
    return root


def check(images: Path, suffix: str, content: bytes) -> None:
    """Open a table: it offers images of its folder, each once, or an error names it."""
    with tempfile.NamedTemporaryFile(dir=images, prefix="t", suffix=suffix) as file:
        file.write(content)
        file.flush()
        line, read = "", []
        try:
            offers = open_sources([file.name])
            read = [content_of(reading) for reading in offers.reads(range(len(offers)))]
        except LgpError as e:
            line = str(e)
            offers = None
    if offers is None:
        assert Path(file.name).name in line
        return
    assert len(offers.paths) == len(set(offers.paths))
    for path, data in zip(offers.paths, read, strict=True):
        assert data != (images.parent / SECRET).read_bytes()
        # a row of Parquet has the name of the table, and a damaged one may hold what is no image
        assert suffix == ".parquet" or data is None or (path in NAMES and data == (images / path).read_bytes())
    assert all(label is None or label.strip() for label in offers.labels)


def content_of(reading: Callable[[], Any]) -> Any:
    """Return what an offered image has, None if the reading tells that there is none."""
    try:
        return reading()
    except (ValueError, OSError):
        return None


@settings(max_examples=80, deadline=None)
@given(rows=ROWS, delimiter=st.sampled_from(",;\t"), encoding=ENCODINGS)
@example(rows=[{"path": name, "label": "a"} for name in (*NAMES, f"../{SECRET}")], delimiter=",", encoding="utf-8")
def test_any_table_of_text_is_read_or_told(images: Path, rows: Any, delimiter: str, encoding: str) -> None:
    check(images, ".csv", as_csv(rows, delimiter).encode(encoding))


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.dictionaries(COLUMNS, VALUES, max_size=4) | VALUES, max_size=5), whole=st.booleans())
@example(rows=[{"path": name, "label": "a"} for name in (*NAMES, f"../{SECRET}")], whole=False)
def test_any_lines_of_json_are_read_or_told(images: Path, rows: Any, whole: bool) -> None:
    text = json.dumps(rows) if whole else "\n".join(map(json.dumps, rows))
    check(images, ".jsonl", text.encode())


@settings(max_examples=80, deadline=None)
@given(
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]),
    content=st.binary(max_size=60) | st.binary(max_size=20).map(lambda data: b"path,label\na/0.png," + data),
)
@example(suffix=".csv", content=b"")
@example(suffix=".parquet", content=b"PAR1\0\0\0\0PAR1")
def test_any_bytes_are_read_or_told(images: Path, suffix: str, content: bytes) -> None:
    check(images, suffix, content)


@settings(max_examples=80, deadline=None)
@given(edits=st.lists(st.tuples(st.integers(0, len(PARQUET) - 1), st.integers(1, 255)), min_size=1, max_size=4))
@example(edits=[(len(PARQUET) - 5, 127)])  # the length of the footer
@example(edits=[(320, 1)])  # of a column, one value is missing
def test_any_damage_of_a_parquet_table_is_told_or_of_no_consequence(images: Path, edits: list[tuple[int, int]]) -> None:
    damaged = bytearray(PARQUET)
    for place, change in edits:
        damaged[place] ^= change
    check(images, ".parquet", bytes(damaged))
