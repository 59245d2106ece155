"""`--replay STEP` of the pre-training commands, run as its users do."""

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL, merged
from typer.testing import CliRunner

from cli import app
from lgp.data.labels import LabelledImages
from lgp.training.loop import Trainer

RUNNER = CliRunner()


VALUES = merged(
    merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL),
    {"mim": {"base_lr": 1e4, "warmup_epochs": 20, "weight_decay": 0.0, "epochs": 40}},
)


@pytest.fixture(scope="module")
def folder(prepared: LabelledImages, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared images, encoders to go on from, and a mim that diverges by its rate."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(prepared.folder, folder / "data" / "prepared")
    for start in ("mim", "cl"):
        shutil.copytree(encoder_folder.parent, folder / "models" / start)
    return folder


@pytest.fixture
def project(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("params.yaml").write_text(yaml.safe_dump(VALUES))
    return folder


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of change of all files but the cached digests of the code."""
    there = (path for path in folder.rglob("*") if path.is_file() and path.name != "code.json")
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in there}


def test_diverged_training_is_repeated_as_its_message_says_and_nothing_changes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = RUNNER.invoke(app, ["mim"])
    assert failed.exit_code == 1
    (command,) = [part for part in failed.output.split("`") if part.startswith("lgp mim --replay ")]
    before = files(project)
    assert any("resume" in name and name.endswith(".pt") for name in before)
    assert any(name.endswith("mlflow.db") for name in before)
    first: list[int] = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *a: (first.append(self.now.step), step(self, *a))[1])
    shown = RUNNER.invoke(app, command.split()[1:])
    assert shown.exit_code == 0, shown.output
    assert first[0] > 0  # the state was used
    assert files(project) == before
    lines = shown.output.splitlines()
    assert len([line for line in lines if line.startswith("image ")]) == 64
    assert any("mim, step" in line for line in lines)
    assert any("norm of the gradient of" in line and ("nan" in line or "inf" in line) for line in lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--replay", "120"], "--replay 120 is no step of mim, which has 120: choose one from 0 to 119"),
        (["--replay", "-1"], "--replay -1 is no step of mim"),
        (["--replay", "1", "--fresh"], "leave out --fresh and --resume"),
        (["--replay", "1", "--resume"], "leave out --fresh and --resume"),
    ],
)
def test_replay_that_cannot_be_is_one_line(project: Path, options: list[str], said: str) -> None:
    before = files(project)
    result = RUNNER.invoke(app, ["mim", *options])
    assert result.exit_code == 1
    assert [line for line in result.output.splitlines() if line.startswith("error: ")] == [result.output.strip()]
    assert said in result.output
    assert files(project) == before


def test_replay_does_not_run_under_torchrun(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mim")
    monkeypatch.setenv("RANK", "0")
    result = RUNNER.invoke(app, ["mim", "--replay", "1"])
    assert "--replay runs in one process: call it without torchrun" in result.output


def test_step_that_a_training_of_several_processes_ran_is_repeated_in_one(project: Path) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(merged(VALUES, {"run": {"processes": 2}})))
    result = RUNNER.invoke(app, ["mim", "--replay", "0"])
    assert result.exit_code == 0, result.output
    assert "mim, step 0" in result.output


@pytest.mark.parametrize("arm", ["cl", "graft", "joint", "reverse"])
def test_every_arm_takes_it(project: Path, arm: str) -> None:
    before = files(project)
    result = RUNNER.invoke(app, [arm, "--replay", "1"])
    assert result.exit_code == 0, result.output
    assert f"{arm}, step 1" in result.output
    assert "online k-NN" not in result.output  # which is not measured
    assert files(project) == before
