"""`lgp labels add`: labels that arrive later are checked, counted and kept, and move no image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import merged
from PIL import Image
from typer.testing import CliRunner, Result

from cli import app
from lgp.data.labels import LabelledImages
from lgp.data.sources.opening import open_sources
from lgp.params.file import load_params

CLASSES = ("ant", "bee")


def lgp(*command: str) -> Result:
    return CliRunner().invoke(app, list(command))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Path:
    """A project whose source is a flat folder of 60 images, of which 40 have a label in a table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (tmp_path / "raw").mkdir()
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "raw" / f"{i}.png")
    rows = [f"{i}.png,{CLASSES[i % 2]}" for i in range(40)]
    (tmp_path / "first.csv").write_text("\n".join(["path,label", *rows]))
    data = {"source": "raw", "max_train_images": None}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merged(values, {"data": data})))
    return tmp_path


def prepared(project: Path) -> LabelledImages:
    for command in ("prepare", "labels"):
        result = lgp(command)
        assert result.exit_code == 0, result.output
    return LabelledImages(project / "data" / "prepared", project / "data" / "labels")


def test_first_labels_hold_images_out_and_later_ones_train(project: Path) -> None:
    said = lgp("labels", "add", "first.csv").output.splitlines()
    assert said[0] == "labels: 40 new labels, 0 changed, none removed, 0 as before, 0 rows without a label"
    assert said[1:3] == ["labels: ant: 20 labelled images", "labels: bee: 20 labelled images"]
    assert "added_labels.csv has them now; `lgp repro`: these are the first labels" in said[3]
    assert load_params(project / "params.yaml").data.labels == ("added_labels.csv",)
    before = prepared(project)
    assert [len(before.ids(s)) for s in ("train", "unlabeled", "val", "test")] == [28, 20, 4, 8]

    rows = ["40.png,ant", "41.png,bee", "42.png,", "0.png,ant", "1.png,ant"]
    (project / "selected.csv").write_text("\n".join(["path,label", *rows]))
    said = lgp("labels", "add", "selected.csv").output.splitlines()
    assert said[0] == "labels: 2 new labels, 1 changed, none removed, 1 as before, 1 rows without a label"
    assert said[-1].endswith("labels, evaluations and report run again; images and encoders stay")
    digest = before.meta["digest"]
    after = prepared(project)
    assert after.meta["digest"] == digest
    assert [len(after.ids(s)) for s in ("train", "unlabeled", "val", "test")] == [30, 18, 4, 8]
    assert (project / "added_labels.csv").read_text().splitlines()[:3] == ["path,label", "0.png,ant", "1.png,ant"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n99.png,ant\n", "1 of 1 rows name no image of data.source: 99.png (new.csv, row 2)"),
        ("path,label\n1.png,\n", "new.csv labels no image: fill in its column of labels"),
        ("path,label,group\n1.png,ant,p\n", "has splits or groups, which `lgp labels add` does not take"),
        ("where,label\n1.png,ant\n", "has the columns where, label, none of them of paths"),
        ("path,label\n1.png,ant\n1.png,bee\n", "an image has one class, remove one of the rows"),
    ],
)
def test_table_with_a_fault_changes_nothing(project: Path, text: str, message: str) -> None:
    (project / "new.csv").write_text(text)
    before = (project / "params.yaml").read_text()
    result = lgp("labels", "add", "new.csv")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (project / "added_labels.csv").exists()
    assert (project / "params.yaml").read_text() == before


def test_validation_part_of_images_without_any_label_is_no_reason_to_warn(project: Path) -> None:
    assert lgp("prepare").exit_code == 0
    result = lgp("labels")
    assert result.exit_code == 0, result.output
    assert "val_share" not in result.output
    lgp("labels", "add", "first.csv")
    prepared(project)
    assert "raise data.val_share" in lgp("labels").output


def test_prepare_says_what_came_went_and_changed(project: Path) -> None:
    assert "came" not in lgp("prepare").output
    assert "the same images as before" in lgp("prepare").output
    (project / "raw" / "0.png").rename(project / "raw" / "60.png")
    (project / "raw" / "1.png").unlink()
    Image.new("L", (8, 8)).save(project / "raw" / "2.png")
    assert "since the last time, 1 images came, 2 went, 1 changed" in lgp("prepare").output


def test_work_of_prepare_is_removed_once_its_result_is_published(project: Path) -> None:
    assert lgp("prepare").exit_code == 0
    assert not list((project / ".lgp" / "resume").rglob("pieces-*"))
    assert (project / "held_out.csv").read_text().startswith("# seed ")


def test_labels_are_added_beside_tables_and_columns_of_the_users_own(project: Path, values: dict[str, Any]) -> None:
    (project / "labels.csv").write_text("bild,diagnosis,group\n50.png,ant,p\n51.png,bee,q\n")
    data = {"source": "raw", "labels": "labels.csv", "columns": {"image": "bild", "label": "diagnosis"}}
    (project / "params.yaml").write_text(yaml.safe_dump(merged(values, {"data": data})))
    own = (project / "labels.csv").read_text()
    (project / "new.csv").write_text("bild,diagnosis\n52.png,ant\n53.png,bee\n")
    result = lgp("labels", "add", "new.csv")
    assert result.exit_code == 0, result.output
    assert (project / "labels.csv").read_text() == own
    data_section = load_params(project / "params.yaml").data
    assert data_section.labels == ("labels.csv", "added_labels.csv")
    offers = open_sources(data_section.source, data_section.columns, data_section.labels)
    assert sum(label is not None for label in offers.labels) == 4
    assert {group for group in offers.groups if group} == {"p", "q"}
