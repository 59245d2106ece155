"""What surrounds the work of a stage."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lgp.training.resume_states import StateStore
from lgp.workflow import tracking
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


def test_a_finished_stage_removes_the_states_of_other_code_and_a_failed_one_keeps_them(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "tracked", lambda *_: contextlib.nullcontext(tracking.Untracked()))
    spec = StageSpec("mim", SECTIONS["mim"], [], [Path("out.json")], "mim", "pretrain")

    def train(fails: bool) -> None:
        with stage(spec, project / "params.yaml") as run:
            StateStore(run.store.folder, "a" * 64).save({"step": 1})
            if fails:
                raise RuntimeError
            run.out(Path("out.json")).write_text("{}")

    def states() -> list[Path]:
        return list(Path(".lgp/resume").rglob("state-*"))

    with pytest.raises(RuntimeError):
        train(fails=True)
    assert len(states()) == 1
    train(fails=False)
    assert states() == []
    said = capsys.readouterr().out
    assert "it is used only with --resume, and is removed when this training is finished" in said
    assert "mim / pretrain: finished: the resume state that other code wrote of this training is removed" in said
