"""The stage `inputs`: what it writes where the source of the images is there, gone, or never was."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, merged

from lgp.data.sources import specs
from lgp.data.sources.specs import columns_of
from lgp.data.sources.states import STATE
from lgp.params.data import TABLES
from lgp.workflow.inputs import LABELS, PREPARED, _checked, _plain, write_inputs
from lgp.workflow.pipeline import SECTIONS

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
HEAVY = {"numpy", "pandas", "pyarrow", "pydantic", "torch"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Path:
    """A project whose source is a Parquet file of two images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    images = [{"bytes": b"", "path": None}] * 2
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "images" / "train.parquet")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merged(values, {"data": {"source": "images"}})))
    return tmp_path


def labels_after(project: Path) -> str:
    write_inputs(project / "inputs", project / "params.yaml", project)
    return (project / "inputs" / "labels").read_text().strip()


def test_every_stage_has_a_digest_of_its_own(project: Path) -> None:
    labels_after(project)
    digests = {path.name: path.read_text() for path in (project / "inputs" / "code").iterdir()}
    assert digests.keys() == SECTIONS.keys()
    assert len(set(digests.values())) == len(SECTIONS)


def test_state_of_a_source_that_is_gone_is_the_one_that_the_labels_were_read_from(project: Path) -> None:
    state = labels_after(project)
    (project / LABELS).mkdir(parents=True)
    (project / LABELS / STATE).write_text(f"{state}\n")
    shutil.rmtree(project / "images")
    assert labels_after(project) == state


def test_state_of_images_that_are_gone_is_the_one_that_they_were_prepared_from(project: Path) -> None:
    labels_after(project)
    state = (project / "inputs" / "images").read_text()
    (project / PREPARED).mkdir(parents=True)
    (project / PREPARED / STATE).write_text(state)
    shutil.rmtree(project / "images")
    labels_after(project)
    assert (project / "inputs" / "images").read_text() == state


def test_another_label_changes_the_state_of_labels_and_another_image_both(
    project: Path, values: dict[str, Any]
) -> None:
    (project / "raw").mkdir()
    for name in ("0.png", "1.png"):
        (project / "raw" / name).write_bytes(name.encode())
    changes = {"data": {"source": "raw", "labels": "labels.csv"}}
    (project / "params.yaml").write_text(yaml.safe_dump(merged(values, changes)))

    def states(labels: str) -> tuple[str, str]:
        (project / "labels.csv").write_text(f"path,label\n{labels}")
        return labels_after(project), (project / "inputs" / "images").read_text()

    before, relabelled = states("0.png,a\n1.png,b\n"), states("0.png,c\n1.png,b\n")
    assert before[0] != relabelled[0]
    assert before[1] == relabelled[1]
    (project / "raw" / "1.png").write_bytes(b"other")
    changed = states("0.png,c\n1.png,b\n")
    assert changed[0] == relabelled[0]
    assert changed[1] != relabelled[1]


def test_fault_in_a_source_that_is_there_changes_both_states(project: Path) -> None:
    state = labels_after(project)
    for folder in (PREPARED, LABELS):
        (project / folder).mkdir(parents=True)
        (project / folder / STATE).write_text(f"{state}\n")
    (project / "images" / "train.parquet").write_bytes(b"damaged")
    assert labels_after(project).startswith("unreadable: ")
    assert (project / "inputs" / "images").read_text().startswith("unreadable: ")


def test_source_that_never_was_stops_no_stage_but_the_labels(project: Path) -> None:
    shutil.rmtree(project / "images")
    assert labels_after(project).startswith("unreadable: data.source 'images' does not exist")


def test_wrong_parameter_file_is_an_error(project: Path) -> None:
    (project / "params.yaml").write_text("seed: [")
    with pytest.raises(Exception, match="not valid YAML"):
        labels_after(project)


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("graf", "arms names graf, and there is no such arm: did you mean graft? If not, train mim, cl, graft, joint,"),
        ("dino", "arms names dino, and there is no such arm: train mim, cl, graft, joint, reverse, or run `lgp import"),
    ],
)
def test_arm_that_nothing_makes_is_refused_before_anything_trains(
    arm: str, said: str, project: Path, values: dict[str, Any]
) -> None:
    values = merged(values, {"data": {"source": "images"}, "arms": [*values["arms"], arm]})
    (project / "params.yaml").write_text(yaml.safe_dump(values))
    run = [sys.executable, "-m", "lgp.workflow.inputs"]
    refused = subprocess.run(run, cwd=project, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert said in refused.stderr
    (project / "models" / arm / "encoder").mkdir(parents=True)  # imported
    subprocess.run(run, cwd=project, env=ENVIRONMENT, check=True)
    shutil.rmtree(project / "models")
    (project / "dvc.yaml").write_text(f"stages: {{x: {{cmd: make, outs: [models/{arm}/encoder]}}}}")
    subprocess.run(run, cwd=project, env=ENVIRONMENT, check=True)


def test_folder_with_a_table_is_looked_at_without_heavy_imports(project: Path, values: dict[str, Any]) -> None:
    (project / "raw").mkdir()
    (project / "raw" / "0.png").write_bytes(b"x")
    (project / "labels.csv").write_text("bild,label\n0.png,a\n")
    data = {"source": "raw", "labels": "labels.csv", "columns": {"image": "bild"}}
    (project / "params.yaml").write_text(yaml.safe_dump(merged(values, {"data": data})))
    code = "import sys, lgp.workflow.inputs as i; i.main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
    state = (project / "inputs" / "labels").read_text()
    assert not state.startswith("unreadable")


@pytest.mark.parametrize(
    "data",
    [
        {"source": "raw"},
        {"source": ["raw", "more.csv"], "columns": {"image": "bild", "label": None}, "noticed_by": "digest"},
        {"source": "raw", "labels": ["more.csv"], "columns": {}},
    ],
)
def test_sources_that_are_text_are_read_as_the_checked_ones(
    project: Path, values: dict[str, Any], data: dict[str, Any]
) -> None:
    section = merged(values, {"data": data})["data"]
    sources, columns, tables, noticed_by = _checked(section, project / "params.yaml")
    assert _plain(section) == (sources, columns_of(columns), tables, noticed_by)


@pytest.mark.parametrize(
    "data",
    [
        {"source": [{"folder": "raw"}]},
        {"source": 5},
        {"source": []},
        {"source": "raw", "columns": {"imag": "x"}},
        {"source": "raw", "columns": {"image": 3}},
        {"source": "raw", "labels": [3]},
        {"source": "raw", "noticed_by": "size"},
    ],
)
def test_other_sources_are_checked(data: dict[str, Any]) -> None:
    assert _plain(data) is None


def test_kinds_of_tables_are_those_of_the_parameters() -> None:
    assert specs.TABLES == TABLES
