"""`lgp data inspect` as its users run it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from typer.testing import CliRunner

from cli import app
from lgp.params.file import load_params

RNG = np.random.default_rng(0)


def lgp(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def images(folder: Path, number: int, size: tuple[int, int] = (30, 40)) -> None:
    folder.mkdir(parents=True)
    for i in range(number):
        Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the preset digits, where no step is measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.setattr("lgp.pretrain.speed.images_per_second", lambda _params, _arm: 1000.0)
    Path("params.yaml").write_text((ROOT / "presets" / "digits.yaml").read_text())
    return tmp_path


def test_folder_is_inspected_and_nothing_changes(project: Path) -> None:
    images(project / "photos" / "ant [red]", 12)
    images(project / "photos" / "bee", 12)
    (project / "photos" / "notes.txt").write_text("none")
    before = Path("params.yaml").read_text()
    result = lgp("data", "inspect", "photos")
    assert result.exit_code == 0, result.output
    for said in (
        "25 files and rows: 24 images, 0 skipped, 1 of no image by their names",
        "ant [red]",
        "24 images decoded (all images)",
        "advice: set data.image_size to 28, it is 8",
        "advice: val has 2 images",
        "writes the preset cifar10-cpu with:",
        "data.source: photos",
        "`dvc repro` takes about",
        "`lgp repro` less where cores are idle: ",
    ):
        assert said in result.output
    assert Path("params.yaml").read_text() == before
    with Image.open("reports/inspect.jpg") as sheet:
        assert (sheet.format, sheet.width) == ("JPEG", 840)


def test_source_without_an_image_gets_no_empty_tables(project: Path) -> None:
    (project / "photos").mkdir()
    (project / "photos" / "notes.txt").write_text("none")
    result = lgp("data", "inspect", "photos")
    assert result.exit_code == 1
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["1 files and rows", "no image"]
    assert "the data source holds no image at all" in result.output


def test_proposal_is_written_and_the_old_file_kept(project: Path) -> None:
    images(project / "photos" / "ant", 20)
    images(project / "photos" / "bee", 20)
    before = Path("params.yaml").read_text()
    result = lgp("data", "inspect", "photos", "--write", "--minutes", "2")
    assert result.exit_code == 0, result.output
    params = load_params(Path("params.yaml"))
    assert params.data.source == ["photos"]
    assert "source: photos " in Path("params.yaml").read_text()
    assert (params.data.image_size, params.data.channels, params.model.patch_size) == (28, 3, 7)
    assert params.few_labels == ["1shot", "5shot", "all"]
    assert Path("params.yaml.before").read_text() == before
    again = lgp("data", "inspect", "--write")
    assert again.exit_code == 0, again.output
    assert "advice: set" not in again.output
    assert Path("params.yaml.before2").exists()


def test_flat_folder_gets_its_labels_from_a_table(project: Path) -> None:
    images(project / "photos", 16)
    rows = "".join(f"photos/{i}.png,{'ant' if i % 2 else 'bee'}\n" for i in range(14))
    Path("labels.csv").write_text(f"path,label\n{rows}")
    text = Path("params.yaml").read_text().replace("source: digits", "source: [{folder: photos, class_folders: false}]")
    Path("params.yaml").write_text(text.replace("labels: [] ", "labels: [labels.csv] "))
    result = lgp("data", "inspect", "--write")
    assert result.exit_code == 0, result.output
    assert "(without a label)" in result.output
    params = load_params(Path("params.yaml"))
    assert params.data.labels == ("labels.csv",)
    assert params.data.source[0].folder == "photos"  # type: ignore[union-attr]


def test_images_without_labels_can_be_trained(project: Path) -> None:
    images(project / "photos", 10)
    result = lgp("data", "inspect", "photos")
    assert result.exit_code == 0, result.output
    assert "advice: no image has a label" in result.output
    assert "interval" not in result.output


def test_sample_may_be_smaller(project: Path) -> None:
    images(project / "photos", 10)
    assert "3 images decoded (of 10, evenly spaced)" in lgp("data", "inspect", "photos", "--sample", "3").output


def test_source_of_no_image_is_one_line(project: Path) -> None:
    (project / "photos").mkdir()
    (project / "photos" / "a.png").write_bytes(b"nothing")
    result = lgp("data", "inspect", "photos", "--write")
    assert result.exit_code == 1
    assert "unreadable: 1 × damaged" in result.output
    assert "error: no image of the sample can be read" in result.output
    assert not Path("params.yaml.before").exists()
    missing = lgp("data", "inspect", "elsewhere")
    assert missing.exit_code == 1
    assert "error: data.source 'elsewhere' does not exist" in missing.output
