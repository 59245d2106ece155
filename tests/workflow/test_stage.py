"""What surrounds the work of a stage."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from lgp.compute import machines
from lgp.errors import LgpError
from lgp.training.resume_states import StateStore
from lgp.workflow import stage as stage_module
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


@pytest.fixture
def meetings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the stage says where it meets other machines, and when the meeting is over."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def together(name: str, facts: Callable[[], Any], versions: Any, lost_after_s: float) -> Iterator[None]:
        seen.append((name, facts(), versions, lost_after_s))
        yield
        seen.append("over")

    monkeypatch.setattr(machines, "together", together)
    monkeypatch.setattr(stage_module, "code_digests", lambda _: {"mim": "0123456789abcdef" * 4})
    for name, value in {"TORCHELASTIC_RUN_ID": "mim", "RANK": "1", "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    return seen


def test_several_machines_compare_what_they_start_from(project: Path, meetings: list[Any]) -> None:
    (project / "images").write_text("a")
    (project / "params.yaml").write_text(
        (project / "params.yaml").read_text().replace("run:", "run:\n  lost_after_s: 7\n  accumulate: {mim: 2}\n")
    )
    spec = StageSpec("mim", SECTIONS["mim"], [Path("images")], [Path("out.json")], "mim", "pretrain", trains=True)
    with stage(spec, project / "params.yaml"):
        ((name, facts, versions, lost_after_s),) = meetings
    assert meetings[1:] == ["over"]
    assert (name, lost_after_s) == ("mim", 7)
    assert facts["mim.epochs"] == "2"
    assert facts["seed"] == "0"
    assert facts["model.width"] == "16"
    assert facts["run.accumulate.mim"] == "2"
    assert facts["run.precision"] == "auto"
    assert facts["images"] == sha256(b"a").hexdigest()[:16]
    assert facts["code"] == "0123456789abcdef"
    assert not [fact for fact in facts if fact.startswith(("graft", "linear", "run.t", "run.d"))]
    assert versions == {"torch": version("torch"), "timm": version("timm")}


def test_a_machine_without_an_input_tells_the_others_so(project: Path, meetings: list[Any]) -> None:
    spec = StageSpec("mim", SECTIONS["mim"], [Path("images")], [Path("out.json")], "mim", "pretrain", trains=True)
    with pytest.raises(LgpError, match="mim needs images"), stage(spec, project / "params.yaml"):
        pass
    assert "images" not in meetings[0][1]


def test_processes_of_one_machine_meet_nobody(
    project: Path, meetings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    spec = StageSpec("mim", SECTIONS["mim"], [], [Path("out.json")], "mim", "pretrain", trains=True)
    with stage(spec, project / "params.yaml"):
        pass
    assert meetings == []


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


@pytest.mark.parametrize("shared", [False, True])
def test_stage_waits_for_the_same_one_elsewhere_unless_other_processes_would_not(
    project: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    asked = []

    def refuse(_store: StateStore, waits: bool = False) -> None:
        asked.append(waits)
        raise LgpError("held")

    monkeypatch.setattr(StateStore, "acquire", refuse)
    if shared:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mim")
        monkeypatch.setenv("RANK", "0")
    spec = StageSpec("mim", SECTIONS["mim"], [], [Path("out.json")], "mim", "pretrain", trains=True)
    with pytest.raises(LgpError, match="held"), stage(spec, project / "params.yaml"):
        pass
    assert asked == [not shared]
