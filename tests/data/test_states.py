"""The state of the images: what a change of time, of content, and of labels does to it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_files import tar_archive, zip_archive
from made_sources import data_params, write_parquet

from lgp.data.sources import contents
from lgp.data.sources.opening import open_sources
from lgp.data.sources.states import images_state, is_state
from lgp.params.file import Params

SOURCES = ["raw", "raw/t.csv", {"csv": "raw/t.csv", "root": "raw"}, "set-{0..0}.tar", "set.zip", "set.npz", "rows"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state(params: Params, source: Any, noticed_by: str = "digest") -> str:
    given = data_params(params, source, noticed_by=noticed_by)
    return images_state(open_sources(given.source, given.columns, given.labels), noticed_by, given.source)


def write(project: Path, images: list[bytes]) -> None:
    """Write the same images in every layout. All files have one time."""
    for name in ("raw", "rows"):
        (project / name).mkdir(exist_ok=True)
    files = {f"{i}.png": data for i, data in enumerate(images)}
    for name, data in files.items():
        (project / "raw" / name).write_bytes(data)
    (project / "raw" / "t.csv").write_text("path\n0.png\n1.png\n")
    tar_archive(project / "set-0.tar", files)
    zip_archive(project / "set.zip", files)
    np.savez(project / "set.npz", images=np.frombuffer(b"".join(images), np.uint8).reshape(2, 2, 2))
    write_parquet(project / "rows" / "train.parquet", [0, 1], None, images=images)
    touch(project, 5)


def touch(project: Path, time: int) -> None:
    for file in [*project.glob("*.*"), *project.glob("r*/*")]:
        os.utime(file, ns=(time, time))


@pytest.mark.parametrize("source", SOURCES)
def test_digest_notices_content_and_no_time(project: Path, params: Params, source: Any) -> None:
    write(project, [b"aaaa", b"bbbb"])
    before, by_time = state(params, source), state(params, source, "time")
    touch(project, 9)
    assert state(params, source) == before
    assert state(params, source, "time") != by_time
    write(project, [b"bbbb", b"aaaa"])  # of the same sizes and times
    assert state(params, source, "time") == by_time
    assert state(params, source) != before


def test_digests_are_taken_once(project: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, [b"aaaa", b"bbbb"])
    (project / "raw" / "link").symlink_to(".")  # a loop
    read: list[str] = []
    digest = contents._digest
    monkeypatch.setattr(contents, "_digest", lambda file: read.append(Path(file).name) or digest(file))
    before = state(params, "raw")
    assert sorted(read)[:2] == ["0.png", "1.png"]
    first = len(read)
    assert state(params, "raw") == before
    assert len(read) == first
    (project / "raw" / "1.png").write_bytes(b"other")
    changed = state(params, "raw")
    assert changed != before
    assert "0.png" not in read[first:]
    (project / ".lgp" / "file_digests.json").write_text("damaged")
    assert state(params, "raw") == changed
    assert "0.png" in read[first:]


def test_digest_leaves_what_has_no_file(project: Path, params: Params) -> None:
    assert state(params, "digits").removeprefix("digest ") == state(params, "digits", "time")


def test_state_is_compared_as_it_was_taken(project: Path, params: Params) -> None:
    write(project, [b"aaaa", b"bbbb"])
    noted = {by: state(params, "raw", by) for by in ("time", "digest")}
    touch(project, 9)
    offers = open_sources(["raw"])
    assert [is_state(noted[by], offers, ["raw"]) for by in noted] == [False, True]
    (project / "raw" / "0.png").write_bytes(b"cccc")
    assert not is_state(noted["digest"], open_sources(["raw"]), ["raw"])
