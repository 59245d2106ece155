"""The stage `semi`: what it needs, what it writes, and where its results are shown."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SMALL, merged
from typer.testing import CliRunner

from cli import app

TASKS = ("finetune", "semi")
SEMI = {
    "arms": ["random", "mae"],
    "finetuned_arms": ["random"],
    "semi_supervised": ["10pct"],
    "semi": {"epochs": 1, "warmup_epochs": 0, "batch_size": 10, "rand_augment": None},
}


def write(changes: dict[str, Any]) -> None:
    values = merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL)
    Path("params.yaml").write_text(yaml.safe_dump(merged(merged(values, SEMI), changes)))


def lgp(*arguments: str, fails: bool = False) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == fails, (arguments, result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with an untrained encoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("project"))
        patch.delenv("DVC_ROOT", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        write({})
        for command in (["prepare"], ["labels"], ["baseline", "random"]):
            lgp(*command)
        yield Path.cwd()
    torch.use_deterministic_algorithms(False)


def test_it_goes_on_from_fine_tuning_and_writes_what_that_writes(project: Path) -> None:
    """One test, for each step needs the one before."""
    said = lgp("semi", "random", "10pct", fails=True)
    assert (
        "semi needs metrics/random-finetune-10pct.json, which does not exist: run `lgp finetune random 10pct`" in said
    )
    lgp("finetune", "random", "10pct")
    said = lgp("semi", "random", "10pct")
    assert "semi: random, subset 5 of 5, 20 labels, 200 images without" in said
    metrics = {task: json.loads((project / f"metrics/random-{task}-10pct.json").read_text()) for task in TASKS}
    assert metrics["semi"].keys() - metrics["finetune"].keys() == {"train/kept", "val/kept", "unlabelled"} | (
        {"val/kept_top1"} & metrics["semi"].keys()
    )
    for key in ("base_lr", "encoder", "labels", "subsets"):
        assert metrics["semi"][key] == metrics["finetune"][key]
    assert (project / "predictions/random-semi-10pct.parquet").exists()
    about = json.loads((project / "models/random/classifiers/semi-10pct/provenance.json").read_text())
    assert about["metrics"].items() <= metrics["semi"].items()
    assert about["params"].keys() == {"seed", "finetune", "semi"}
    assert "metrics/random-finetune-10pct.json" in about["digests"]["inputs"]
    write({"finetune": {"10pct": {"base_lr": 0.5}}})
    said = lgp("semi", "random", "10pct", fails=True)
    assert "which is not among finetune.10pct.base_lr [0.5]: run `lgp finetune random 10pct` again" in said
    write({})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["semi", "pixels", "10pct"], "the arm pixels has no encoder to fine-tune: choose another arm"),
        (["semi", "random", "1pct"], "there is no recipe finetune.1pct, only 10pct: add it"),
    ],
)
def test_what_it_cannot_do_is_refused(project: Path, arguments: list[str], message: str) -> None:
    assert message in lgp(*arguments, fails=True)


def test_it_needs_its_section(project: Path) -> None:
    write({"semi": None, "semi_supervised": []})
    assert "there is no section semi: add it" in lgp("semi", "random", "10pct", fails=True)
    write({})
