"""What surrounds the work of a stage."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lgp.workflow.pipeline import SECTIONS
from lgp.workflow.stage import StageSpec, stage


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Path:
    """A folder with a parameter file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def keys_read_by(sections: Sequence[str], project: Path, key: str) -> Any:
    spec = StageSpec("mim", sections, [], [Path("out.json")], "mim", "pretrain")
    with stage(spec, project / "params.yaml") as run:
        return getattr(run.params, key)


@pytest.mark.parametrize("hidden", ["cl", "graft", "linear", "labels", "features"])
def test_stage_cannot_read_a_section_that_dvc_does_not_watch_for_it(project: Path, hidden: str) -> None:
    with pytest.raises(AttributeError, match=hidden):
        keys_read_by(SECTIONS["mim"], project, hidden)
    assert not (project / "out.json").exists()


def test_worker_of_a_shared_training_sees_the_same_sections(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mim")
    monkeypatch.setenv("RANK", "1")
    spec = StageSpec("mim", SECTIONS["mim"], [], [Path("out.json")], "mim", "pretrain", trains=True)
    with stage(spec, project / "params.yaml") as run:
        assert run.params.mim.epochs == 2
        with pytest.raises(AttributeError, match="graft"):
            run.params.graft  # noqa: B018
