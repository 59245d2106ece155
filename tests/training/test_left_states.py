"""What interrupted trainings left, and when it expires."""

from pathlib import Path

import pytest

from lgp.training.left_states import LeftState, expire, left_states, running, unused
from lgp.training.resume_states import StateStore

OLD, NEW = "a" * 64, "b" * 64


def left_by(code: str, folder: Path) -> StateStore:
    """Leave the state of a training in two parts."""
    store = StateStore(folder, code)
    store.save({"step": 1})
    store.part("rate-0").save({"step": 1})
    store.run_id_file.write_text("run")
    return store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "resume" / "graft-finetune-10pct" / "key"


def test_states_are_listed_by_training_and_code(folder: Path) -> None:
    left_by(OLD, folder)
    left_by(NEW, folder)
    old, new = left_states(folder.parent.parent)
    assert (old.arm, old.task, old.stage, old.command) == (
        "graft",
        "finetune-10pct",
        "finetune",
        "lgp finetune graft 10pct",
    )
    assert (old.is_of(OLD), old.is_of(NEW), old.is_of(None), new.is_of(NEW)) == (True, False, False, True)
    assert [path.relative_to(folder).as_posix() for path in old.files] == [
        "rate-0/state-aaaaaaaaaaaaaaaa.pt",
        "state-aaaaaaaaaaaaaaaa.pt",
        "run_id-aaaaaaaaaaaaaaaa",
    ]


@pytest.mark.parametrize(
    ("name", "stage", "command"),
    [("mim-pretrain", "mim", "lgp mim"), ("data-prepare", "prepare", "lgp prepare")],
)
def test_the_command_that_goes_on_is_known(name: str, stage: str, command: str, tmp_path: Path) -> None:
    left = LeftState(tmp_path / name / "key", "code", ())
    assert (left.stage, left.command) == (stage, command)


def test_states_of_other_code_expire_when_the_training_is_finished(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = left_by(OLD, folder), left_by(NEW, folder)
    expire(folder, NEW)
    assert not old.has_state()
    assert not old.run_id_file.exists()
    assert new.has_state()
    assert new.run_id_file.exists()
    said = "graft / finetune-10pct: finished: the resume state that other code wrote of this training is removed\n"
    assert capsys.readouterr().out == said
    expire(folder, NEW)
    assert capsys.readouterr().out == ""


def test_the_last_state_takes_the_folder_with_it(folder: Path) -> None:
    left_by(OLD, folder)
    expire(folder, NEW)
    assert not folder.exists()


def test_a_linked_state_is_removed_and_its_target_stays(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "file").write_text("x")
    folder.mkdir(parents=True)
    (folder / "state-aaaaaaaaaaaaaaaa").symlink_to(target)
    expire(folder, NEW)
    assert (target / "file").exists()
    assert not folder.exists()


def test_a_stage_that_runs_is_told_and_keeps_its_folder(folder: Path) -> None:
    store = StateStore(folder, NEW)
    store.acquire()
    (name,) = running(folder.parent.parent)
    assert name.startswith("graft-finetune-10pct (process ")
    with unused(folder) as free:
        assert not free
    store.close(succeeded=False)
    assert running(folder.parent.parent) == []
    with unused(folder) as free:
        assert free
