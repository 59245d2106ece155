"""What `lgp clean` takes, and what it must leave."""

import os
from pathlib import Path

import pytest
import yaml

from lgp.errors import LgpError
from lgp.params.file import Params
from lgp.training.resume_states import StateStore
from lgp.workflow.leftovers import Leftover, age_text, leftovers, size_of

PREPARED, LABELS = Path("data/prepared"), Path("data/labels")
DEAD = 2**22 + 1  # Linux gives no process a larger number


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lgp.workflow.leftovers.code_digests", lambda _root: {"mim": "b" * 64})
    return Path()


def made(*names: str) -> None:
    for path in map(Path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content")


def found(params: Params, waiting: bool = False) -> dict[str, str]:
    return {left.paths[0].as_posix(): left.what for left in all_of(params, waiting)}


def all_of(params: Params, waiting: bool = False) -> list[Leftover]:
    return leftovers(Path(), params, PREPARED, LABELS, waiting)


def test_an_empty_project_has_nothing_to_clean(root: Path, params: Params) -> None:
    assert found(params) == {}


def test_states_of_other_code_are_taken_and_those_that_wait_only_if_asked(root: Path, params: Params) -> None:
    folder = Path(".lgp/resume/mim-pretrain/key")
    for code in ("a" * 64, "b" * 64):
        StateStore(folder, code).save({"step": 1})
    old, new = (f"{folder}/state-{code * 16}.pt" for code in "ab")
    assert found(params) == {old: "resume state of other code: mim / pretrain"}
    assert found(params, waiting=True).keys() == {old, new}
    assert all(left.remove() for left in all_of(params))
    assert not Path(old).exists()
    assert Path(new).exists()


def test_a_state_of_a_training_that_runs_stays(root: Path, params: Params) -> None:
    store = StateStore(Path(".lgp/resume/mim-pretrain/key"), "a" * 64)
    store.save({"step": 1})
    store.acquire()
    assert [left.remove() for left in all_of(params)] == [False]
    assert store.has_state()


def test_what_kills_left_is_taken(root: Path, params: Params) -> None:
    made("models/.partial.mim/x", "metrics/.partial.a.json", "models/mim/classifiers/.partial.linear/x")
    made(f".lgp/code.{DEAD}", f".lgp/code.{os.getpid()}", ".lgp/code.json", f".lgp/checked/abc.{DEAD}")
    made(".lgp/features/new.partial/0.npy")  # a tool without a lock may write it now
    made(".lgp/features/abc.partial/0.npy", ".lgp/resume/mim-pretrain/key/state-bbbbbbbbbbbbbbbb.new")
    os.utime(".lgp/features/abc.partial", (0, 0))
    assert found(params).keys() == {
        "models/.partial.mim",
        "metrics/.partial.a.json",
        "models/mim/classifiers/.partial.linear",
        f".lgp/code.{DEAD}",
        f".lgp/checked/abc.{DEAD}",
        ".lgp/features/abc.partial",
        ".lgp/resume/mim-pretrain/key/state-bbbbbbbbbbbbbbbb.new",
    }


def test_results_are_taken_only_where_nothing_names_them(root: Path, params: Params) -> None:
    made("predictions/mim-linear.parquet", "predictions/old-linear.parquet", "predictions/kept-linear.parquet")
    made("predictions/locked-linear.parquet", "metrics/kept-linear.json", "models/old/classifiers/linear/config.json")
    outs = [{"path": "predictions/locked-linear.parquet"}]
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"linear@locked": {"outs": outs}}}))
    assert found(params) == {
        "models/old/classifiers/linear": "classifier without metrics: old-linear",
        "predictions/old-linear.parquet": "predictions without metrics: old-linear",
    }


def test_nothing_that_holds_or_lies_in_an_output_of_dvc_is_taken(root: Path, params: Params) -> None:
    made("models/old/classifiers/linear/deep/config.json", "models/.partial.mim/encoder/x")
    outs = [{"path": "models/old/classifiers/linear/deep"}, {"path": "models/.partial.mim/encoder/x"}]
    Path("controls").mkdir()
    Path("controls/dvc.lock").write_text(yaml.safe_dump({"stages": {"joint": {"outs": outs}}}))
    assert found(params) == {}


def test_a_damaged_lock_file_ends_the_search(root: Path, params: Params) -> None:
    made("dvc.lock", "models/.partial.mim")
    with pytest.raises(LgpError, match=r"dvc\.lock cannot be read, so nothing is known to be unneeded"):
        found(params)


def test_nothing_behind_a_link_out_of_the_project_is_taken(
    root: Path, params: Params, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / ".partial.mim").mkdir()
    (elsewhere / "file").write_bytes(bytes(1000))
    Path("models").symlink_to(elsewhere)
    assert found(params) == {}
    made("predictions/.partial.x/link")
    Path("predictions/.partial.x/link").unlink()
    Path("predictions/.partial.x/link").symlink_to(elsewhere)
    (left,) = all_of(params)
    assert size_of(left.paths) < 1000
    assert left.remove()
    assert (elsewhere / "file").exists()


def test_outcomes_of_an_arm_that_is_gone_are_taken(root: Path, params: Params) -> None:
    made(".lgp/outcomes/old-linear-1pct.parquet", ".lgp/outcomes/mim-linear-1pct.parquet", "models/mim/encoder/x")
    assert found(params).keys() == {".lgp/outcomes/old-linear-1pct.parquet"}


def test_features_are_kept_where_it_is_unknown_who_reads_them(root: Path, params: Params) -> None:
    made(".lgp/features/abc/0.npy")
    assert found(params) == {}


def test_age_is_that_of_the_newest(tmp_path: Path) -> None:
    for name, age in (("a", 7200), ("b", 600)):
        (tmp_path / name).write_text("x")
        stamp = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (stamp, stamp))
    assert age_text(list(tmp_path.iterdir())) == "10 min"
