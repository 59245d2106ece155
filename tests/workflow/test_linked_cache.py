"""DVC's cache behind links, as teams share it: a stage that runs again writes no byte into the cache."""

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.repo import Repo

from lgp.compute.seals import check_sealed
from lgp.models.files import CLASSIFIERS, seal_arm
from lgp.workflow import tracking
from lgp.workflow.inputs import write_inputs
from lgp.workflow.metric_files import write_metrics
from lgp.workflow.pipeline import SECTIONS
from lgp.workflow.stage import StageSpec, stage

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that DVC uses

ARM, INPUTS, PREDICTIONS = Path("models/mim"), Path("inputs"), Path("predictions/mim-linear.parquet")
CLASSIFIER = ARM / CLASSIFIERS / "linear"
OUTS = [ARM / "encoder", ARM / "heads.safetensors", ARM / "metrics.json", PREDICTIONS, CLASSIFIER, INPUTS]


@pytest.fixture(params=["hardlink", "symlink"])
def project(
    request: pytest.FixtureRequest, tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A DVC repository with a shared cache elsewhere and links of one kind, and results that it has in the cache."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    say_code(monkeypatch, "first")
    monkeypatch.setattr(tracking, "tracked", lambda *_: contextlib.nullcontext(tracking.Untracked()))
    Path("params.yaml").write_text(yaml.safe_dump(values))
    stages = {"all": {"cmd": "true", "outs": [str(out) for out in OUTS]}}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    with Repo.init(no_scm=True) as repo, repo.config.edit() as config:
        config["cache"] = {"dir": str(tmp_path / "cache"), "shared": "group", "type": [request.param]}
    CLASSIFIER.mkdir(parents=True)
    (CLASSIFIER / "model.safetensors").write_text("classifier")
    run_stages("first")
    commit()
    linked = (ARM / "encoder" / "model.safetensors", ARM / "heads.safetensors", INPUTS / "code" / "mim")
    for file in linked:
        assert file.is_symlink() if request.param == "symlink" else file.stat().st_nlink > 1
    return folder


def say_code(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    """Let the code of the stage have this digest."""
    for module in ("inputs", "stage"):
        monkeypatch.setattr(f"lgp.workflow.{module}.code_digests", lambda _root: {"mim": digest})


def commit() -> None:
    with Repo() as repo:
        repo.commit(force=True)
        assert repo.status() == {}


def run_stages(content: str) -> None:
    """Write an arm, predictions and `inputs` as stages do by hand. DVC does not remove the outputs before."""
    spec = StageSpec("mim", SECTIONS["mim"], [], [ARM, PREDICTIONS], "mim", "pretrain")
    with stage(spec, Path("params.yaml")) as run:
        arm = run.out(ARM)
        (arm / "encoder").mkdir()
        for file in (
            "encoder/model.safetensors",
            "encoder/config.json",
            "encoder/provenance.json",
            "heads.safetensors",
        ):
            (arm / file).write_text(content)
        write_metrics(run, arm / "metrics.json", {"trained": True, "loss": len(content)})
        run.out(PREDICTIONS).write_text(content)
        seal_arm(arm)
    write_inputs(INPUTS, Path("params.yaml"), Path())


def cached(project: Path) -> dict[str, bytes]:
    """Return the content of all files of the cache, which are named by their digest."""
    files = [file for file in (project.parent / "cache").rglob("*") if file.is_file()]
    return {file.parent.name + file.name: file.read_bytes() for file in files}


def test_stage_that_runs_again_leaves_the_cache_as_it_was(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cached(project)
    say_code(monkeypatch, "second")
    run_stages("second")
    assert cached(project) == before
    assert all(hashlib.md5(content).hexdigest() == name.removesuffix(".dir") for name, content in before.items())
    assert (ARM / "encoder" / "model.safetensors").read_text() == PREDICTIONS.read_text() == "second"
    assert (INPUTS / "code" / "mim").read_text() == "second\n"
    assert (CLASSIFIER / "model.safetensors").read_text() == "classifier"
    check_sealed(ARM / "encoder", "run it again")
    commit()
    assert cached(project).items() > before.items()
