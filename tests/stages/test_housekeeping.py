"""`lgp status` and `lgp clean` in a project with prepared images and one arm."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli import app
from lgp.data.labels import LabelledImages
from lgp.features.cache import FeatureCache
from lgp.features.extraction import ALONE
from lgp.features.of_encoder import encoder_source
from lgp.models.encoder_folder import images_for
from lgp.params.file import Params
from lgp.training.resume_states import StateStore
from lgp.workflow.ahead import AHEAD
from lgp.workflow.kept_runs import KEPT

OLD = "a" * 64
STATE = Path(".lgp/resume/mim-pretrain/key")


def lgp(*arguments: str) -> str:
    ran = CliRunner().invoke(app, list(arguments))
    assert ran.exit_code == 0, ran.output
    return " ".join(ran.output.split())


@pytest.fixture
def project(mim_project: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("lgp.workflow.code_digest.code_digests", lambda _root: {"mim": "b" * 64})
    monkeypatch.setattr("lgp.workflow.leftovers.code_digests", lambda _root: {"mim": "b" * 64})
    (mim_project / "params.yaml").write_text(yaml.safe_dump(values))
    return mim_project


def entry_of(encoder: Path, params: Params, data: LabelledImages) -> Path:
    """Return where the features of an encoder are cached."""
    cache = FeatureCache(Path(".lgp/features"), params.features, 1.0)
    return cache.entry_of(encoder_source(encoder, params.features, ALONE), images_for(encoder, data))


def test_features_that_an_encoder_reads_stay_and_others_go(
    project: Path, params: Params, prepared: LabelledImages
) -> None:
    shutil.copytree(prepared._labels_folder.parent, "data")
    used = entry_of(Path("models/mim/encoder"), params, prepared)
    for entry in (used, used.with_name("0" * 32)):
        entry.mkdir(parents=True)
        (entry / "0.npy").write_bytes(bytes(10))
    listed = lgp("clean")
    assert "0" * 32 in listed
    assert used.name not in listed
    assert used.with_name("0" * 32).exists()
    lgp("clean", "--yes")
    assert [entry.name for entry in used.parent.iterdir()] == [used.name]
    shutil.rmtree("models/mim")
    assert used.name in lgp("clean")


def test_clean_lists_first_and_removes_when_told(project: Path) -> None:
    StateStore(STATE, OLD).save({"step": 1})
    assert "nothing is removed: `lgp clean --yes` removes these 0.0 MiB" in lgp("clean")
    assert STATE.exists()
    assert "clean: removed 1 of 1" in lgp("clean", "--yes")
    assert not STATE.exists()
    assert lgp("clean", "--yes") == "nothing to clean"


def test_clean_takes_evaluations_that_no_stage_asked_for(project: Path) -> None:
    place = AHEAD / "mim-linear"
    place.mkdir(parents=True)
    assert lgp("clean", "--yes") == "nothing to clean"
    os.utime(place, (1e9, 1e9))
    assert "computed ahead, and that no stage has asked for" in lgp("clean", "--yes")
    assert not place.exists()


def test_clean_takes_states_that_wait_only_when_told(project: Path) -> None:
    StateStore(STATE, "b" * 64).save({"step": 1})
    assert lgp("clean", "--yes") == "nothing to clean"
    assert "`lgp clean --yes --waiting` removes these" in lgp("clean", "--waiting")
    assert "clean: removed 1 of 1" in lgp("clean", "--yes", "--waiting")
    assert not STATE.exists()


def test_clean_refuses_while_a_stage_runs(project: Path) -> None:
    store = StateStore(STATE, "b" * 64)
    store.acquire()
    Path("models/.partial.mim").mkdir()
    tried = [CliRunner().invoke(app, ["clean", *how]) for how in ([], ["--yes"])]
    store.close(succeeded=False)
    for ran in tried:
        assert ran.exit_code == 1
        assert "mim-pretrain (process " in ran.output
        assert ".partial.mim" not in ran.output
    assert Path("models/.partial.mim").exists()


def test_status_of_a_project_that_did_nothing_says_so_and_makes_no_store(project: Path) -> None:
    said = lgp("status")
    assert "There is no resume state." in said
    assert "No run is tracked yet." in said
    assert "`lgp repro`: there is no dvc.yaml here: `lgp init` makes a folder a project." in said
    assert not Path("mlflow.db").exists()


def test_status_says_what_becomes_of_each_state(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_now = dict.fromkeys(("mim", "conflict", "linear", "finetune"), "b" * 64)
    monkeypatch.setattr("lgp.workflow.code_digest.code_digests", lambda _root: of_now)
    StateStore(STATE, OLD).save({"step": 1})
    StateStore(STATE.with_name("other"), "b" * 64).save({"step": 1})
    for of_arm in ("mim-conflict", "mim-linear", "mim-finetune-10pct"):
        StateStore(Path(".lgp/resume") / of_arm / STATE.name, "b" * 64).save({"step": 1})
    said = " ".join(lgp("status").split())
    assert "other code wrote it: `lgp mim --resume` takes it, `lgp clean` removes it" in said
    assert "`dvc repro` or `lgp mim` goes on from it" in said
    for command in ("linear mim", "finetune mim 10pct"):
        assert f"`dvc repro` or `lgp {command}` goes on from it" in said
    assert "`lgp conflict mim` goes on from it" in said
    assert "or `lgp conflict" not in said  # no stage of the pipeline


def test_kept_runs_are_sent_and_those_of_other_machines_where_asked(project: Path) -> None:
    head = {"name": "a", "arm": "mim", "task": "report", "tags": {}, "values": {}, "run_id": None, "started_ms": 1000}
    ended = json.dumps({"status": "FINISHED", "at_ms": 2000})
    begun = json.dumps({"tag": {"trained": "true"}, "at_ms": 2000})
    KEPT.mkdir(parents=True)
    for name, last in (("ended", ended), ("begun", begun)):
        (KEPT / f"{name}.jsonl").write_text(json.dumps(head | {"process": "elsewhere 7 12.00"}) + f"\n{last}\n")
    assert "Runs that MLflow did not take: 1. `lgp tracking sync` sends them." in lgp("status")
    said = lgp("tracking", "sync")
    assert "begun.jsonl is left: its process (elsewhere 7 12.00) may still write it sent to sqlite:///" in said
    assert "mlflow.db: 1" in said
    assert "`lgp report` points the alias `champion` at the best arm" in said
    assert [file.name for file in KEPT.iterdir()] == ["begun.jsonl"]
    assert "mlflow.db: 1" in lgp("tracking", "sync", "--all-machines")
    assert lgp("tracking", "sync") == "no run waits to be sent"
