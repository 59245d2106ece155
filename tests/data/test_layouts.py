"""The same images in every layout are the same data, and nothing that a source offers is lost."""

import csv
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_sources import both_from, images_from, labels_from, png
from PIL import Image

from lgp.data.sources.archives import zip_source
from lgp.data.sources.folder import folder_source
from lgp.data.sources.manifest import read_table, table_source
from lgp.data.sources.offers import Columns, Offers
from lgp.errors import LgpError
from lgp.params.file import Params

CLASSES = ("ant", "bee", "wasp")
PICTURES = [png() for _ in range(45)]
LABELS = [CLASSES[i % 3] for i in range(45)]


def as_folder(root: Path) -> Any:
    for i, (data, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        (root / "train" / label).mkdir(parents=True, exist_ok=True)
        (root / "train" / label / f"{i}.png").write_bytes(data)
    return str(root)


def as_flat_folder_with_table(root: Path) -> Any:
    (root / "raw").mkdir(parents=True)
    rows = []
    for i, (data, label) in enumerate(zip(PICTURES[::-1], LABELS[::-1], strict=True)):
        (root / "raw" / f"x{i}.png").write_bytes(data)
        rows.append(f"x{i}.png,{label}")
    (root / "labels.csv").write_text("\n".join(["path,label", *rows]))
    return [{"folder": str(root / "raw")}, {"csv": str(root / "labels.csv")}]


def as_table(root: Path) -> Any:
    as_flat_folder_with_table(root)
    return [{"csv": str(root / "labels.csv"), "root": str(root / "raw")}]


def table() -> pa.Table:
    rows = {"image": [{"bytes": data, "path": None} for data in PICTURES], "label": [CLASSES.index(x) for x in LABELS]}
    features = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    return pa.table(rows).replace_schema_metadata({b"huggingface": json.dumps(features).encode()})


def as_parquet(root: Path) -> Any:
    root.mkdir()
    pq.write_table(table().slice(0, 20), root / "train-0.parquet")
    pq.write_table(table().slice(20), root / "train-1.parquet")
    return str(root)


def as_saved_data_set(root: Path) -> Any:
    root.mkdir()
    with (
        pa.OSFile(str(root / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table().schema) as out,
    ):
        out.write_table(table(), max_chunksize=10)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (root / "dataset_info.json").write_text("{}")
    return str(root)


def as_tar_shards(root: Path) -> Any:
    root.mkdir()
    for shard in range(3):
        with tarfile.open(root / f"shard-{shard}.tar", "w") as archive:
            for i in range(shard, len(PICTURES), 3):
                for name, data in ((f"{i:04}.png", PICTURES[i]), (f"{i:04}.cls", LABELS[i].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return str(root / "shard-{0..2}.tar")


def as_zip(root: Path) -> Any:
    root.mkdir()
    with zipfile.ZipFile(root / "all.zip", "w") as archive:
        for i, (data, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
            archive.writestr(f"{label}/{i}.png", data)
    return str(root / "all.zip")


def as_npz(root: Path) -> Any:
    root.mkdir()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in PICTURES])
    np.savez(root / "all.npz", images=pixels, labels=np.array(LABELS))
    return str(root / "all.npz")


LAYOUTS = [as_folder, as_flat_folder_with_table, as_table, as_parquet, as_saved_data_set, as_tar_shards, as_zip, as_npz]


@pytest.mark.parametrize("make", LAYOUTS[1:])
def test_same_images_in_another_layout_are_the_same_data(
    tmp_path: Path, params: Params, make: Callable[[Path], Any]
) -> None:
    for name, layout in (("one", as_folder), ("other", make)):
        (tmp_path / name).mkdir()
        metrics, data = both_from(layout(tmp_path / name / "source"), tmp_path / name, params)
        if name == "one":
            expected, of_expected = metrics["digest"], data
    assert data.meta["digest"] == of_expected.meta["digest"]
    assert metrics["digest"] == expected
    ids = np.arange(45)
    assert np.array_equal(data.whole(ids), of_expected.whole(ids))
    assert np.array_equal(data.labels, of_expected.labels)
    assert [data.ids(s).tolist() for s in ("train", "val", "test")] == [
        of_expected.ids(s).tolist() for s in ("train", "val", "test")
    ]
    assert [s.tolist() for s in data.subsets("10pct")] == [s.tolist() for s in of_expected.subsets("10pct")]


@pytest.mark.parametrize(
    "names",
    [
        ["train/ant/0", "train/bee/0", "test/ant/0", "extra/x/0"],
        ["ant/0", "bee/0", "stray"],
        ["train/0", "car/0", "bus/0"],
        ["outer/train/ant/0", "outer/train/bee/0", "outer/unlabeled/x/0"],
        ["raw/0", "raw/1"],
        ["Training/ant/deep/0", "Training/bee/0", "Testing/bee/0"],
    ],
)
def test_folders_say_the_same_in_a_folder_and_in_an_archive(tmp_path: Path, names: list[str]) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in names:
            (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "folder" / f"{name}.png").write_bytes(PICTURES[0])
            archive.writestr(f"{name}.png", PICTURES[0])
    one, other = folder_source(tmp_path / "folder"), zip_source([tmp_path / "all.zip"], Columns())

    def said(offers: Offers) -> set[tuple[str, str, str | None]]:
        return set(zip(offers.paths, offers.splits, offers.labels, strict=True))

    assert said(one) == said(other)
    assert {s.path for s in one.skipped} == {s.path for s in other.skipped}
    assert one.classes == other.classes


def test_images_and_labels_that_come_move_no_image(tmp_path: Path, params: Params) -> None:
    source = as_flat_folder_with_table(tmp_path / "source")
    table_file = tmp_path / "source" / "labels.csv"
    rows = table_file.read_text().splitlines()
    table_file.write_text("\n".join(rows[:31]))
    _, images = images_from(source, tmp_path / "one", params)
    _, data = labels_from(source, images, tmp_path / "labels-one", params)
    part = dict(zip(data.paths, data.parts, strict=True))
    for i in range(10):
        (tmp_path / "source" / "raw" / f"new{i}.png").write_bytes(png())
    table_file.write_text("\n".join([*rows, "new0.png,bee"]))
    _, more = images_from(source, tmp_path / "two", params)
    metrics, after = labels_from(source, more, tmp_path / "labels-two", params)
    now = dict(zip(after.paths, after.parts, strict=True))
    assert {path: now[path] for path in part} == part
    assert {now[path] for path in now.keys() - part.keys()} == {"train"}
    assert metrics["images/test"] == len(data.ids("test"))
    assert len(after.ids("train")) == len(data.ids("train")) + 16


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0\n\r"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and len(name.encode()) < 200
)
SUFFIXES = st.sampled_from([".png", ".PNG", ".jpg", ".txt", "", ".db", ".webp"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.lists(NAMES, max_size=3), NAMES, SUFFIXES), max_size=12))
def test_every_file_of_any_folder_is_offered_or_listed(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[list[str], str, str]]
) -> None:
    root = tmp_path_factory.mktemp("any")
    for folders, stem, suffix in files:
        try:
            (root / Path(*folders)).mkdir(parents=True, exist_ok=True) if folders else None
            (root / Path(*folders) / f"{stem}{suffix}").write_bytes(b"x")
        except (NotADirectoryError, IsADirectoryError, FileExistsError):
            continue  # a name is a file in one place and a folder in another
    offers = folder_source(root)
    listed = [*offers.paths, *(s.path for s in [*offers.skipped, *offers.clutter])]
    assert len(set(listed)) == len(listed)
    for path, _, names in os.walk(root):
        for name in names:
            inside = os.path.relpath(os.path.join(path, name), root)
            assert any(inside == one or inside.startswith(f"{one}/") for one in listed)
    for label in offers.labels:
        assert label is None or label in offers.classes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["0.png", "1.png", "../x.png", "/etc/passwd", "", "gone.png"]), NAMES)))
def test_every_row_of_any_table_is_offered_or_listed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    root = tmp_path_factory.mktemp("any")
    for name in ("0.png", "1.png"):
        (root / name).write_bytes(PICTURES[0])
    with (root / "t.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    try:
        offers = table_source(read_table(root / "t.csv"), root, forgiven=len(rows))
    except LgpError:
        return
    assert len(offers) + len(offers.skipped) == len([row for row in rows if any(row)])
    assert set(offers.paths) <= {"0.png", "1.png"}
