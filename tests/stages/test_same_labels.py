"""Names of labels that are the same images: the second takes the first one's outcome, and computes nothing."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, SMALL, merged
from typer.testing import CliRunner

from cli import app

TAKEN = r"random / {}: the same images as {}, whose outcome is taken"
SAME = {
    "labels": {"shots": [1, 2, 3]},
    "finetune": {"2shot": {"epochs": 2, "warmup_epochs": 1}},
}  # 10pct is two of each


def lgp(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output


def write(changes: dict[str, Any]) -> None:
    values = merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL)
    values["finetune"]["2shot"] = values["finetune"]["10pct"]
    Path("params.yaml").write_text(yaml.safe_dump(merged(merged(values, SAME), changes)))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with an untrained encoder, evaluated with 1pct (one image of each class) and 10pct (two)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("project"))
        patch.delenv("DVC_ROOT", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        write({})
        for command in (["prepare"], ["labels"], ["baseline", "random"], ["fewshot", "random", "1pct"]):
            lgp(*command)
        lgp("finetune", "random", "10pct")
        yield Path.cwd()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The evaluations that are computed and not taken, by task."""
    calls: list[str] = []

    def counted(task: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: calls.append(task) or function(*arguments)

    from lgp.evaluate import few_labels, fine_tuning

    def fewshot(features: Any, subsets: Any, params: Any, device: torch.device) -> Any:
        calls.append("fewshot")
        return evaluate(features, subsets, params, device)

    evaluate = few_labels.evaluate_fewshot
    monkeypatch.setattr(few_labels, "evaluate_fewshot", fewshot)
    monkeypatch.setattr(fine_tuning, "finetune", counted("finetune", fine_tuning.finetune))
    return calls


def test_second_name_of_the_same_images_takes_the_outcome(project: Path, computed: list[str]) -> None:
    assert TAKEN.format("fewshot-1shot", "1pct") in lgp("fewshot", "random", "1shot")
    assert computed == []
    for file in ("metrics/random-fewshot-{}.json", "predictions/random-fewshot-{}.parquet"):
        assert (project / file.format("1shot")).read_bytes() == (project / file.format("1pct")).read_bytes()


def test_taken_outcome_is_the_one_that_would_be_computed(project: Path, computed: list[str]) -> None:
    lgp("fewshot", "random", "1shot")
    taken = (project / "predictions" / "random-fewshot-1shot.parquet").read_bytes()
    lgp("fewshot", "random", "1shot", "--fresh")
    assert computed == ["fewshot"]
    assert (project / "predictions" / "random-fewshot-1shot.parquet").read_bytes() == taken
    lgp("fewshot", "random", "1pct", "--fresh")


def test_name_never_takes_its_own_outcome(project: Path, computed: list[str]) -> None:
    lgp("fewshot", "random", "1pct")
    assert computed == ["fewshot"]


@pytest.mark.parametrize(
    "changes",
    [{"fewshot": {"scaling": "normalized"}}, {"features": {"pool": "average"}}, {"run": {"device": "auto"}}],
    ids=["fewshot", "features", "run"],
)
def test_other_parameters_are_computed_anew(project: Path, computed: list[str], changes: dict[str, Any]) -> None:
    write(changes)
    try:
        lgp("fewshot", "random", "1shot")
        assert computed == ["fewshot"]
    finally:
        write({})
        lgp("fewshot", "random", "1pct")


def test_other_images_are_computed_anew(project: Path, computed: list[str]) -> None:
    lgp("fewshot", "random", "2shot")
    assert computed == ["fewshot"]


def test_other_encoder_is_computed_anew(project: Path, computed: list[str]) -> None:
    write({"seed": 1})  # which the stage fewshot does not read
    lgp("baseline", "random")
    lgp("fewshot", "random", "1shot")
    assert computed == ["fewshot"]
    write({})
    lgp("baseline", "random")
    lgp("fewshot", "random", "1pct")


def test_other_code_is_computed_anew(project: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgp.workflow.stage.code_digests", lambda _root: {"fewshot": "other"})
    lgp("fewshot", "random", "1shot")
    assert computed == ["fewshot"]
    monkeypatch.undo()
    lgp("fewshot", "random", "1pct")


def test_fine_tuning_of_the_same_images_by_the_same_recipe_is_taken(project: Path, computed: list[str]) -> None:
    assert TAKEN.format("finetune-2shot", "10pct") in lgp("finetune", "random", "2shot")
    assert computed == []
    metrics = [json.loads((project / f"metrics/random-finetune-{n}.json").read_text()) for n in ("10pct", "2shot")]
    assert metrics[0] == metrics[1]
    assert not list((project / ".lgp" / "resume").rglob("state*"))


@pytest.mark.parametrize("changes", [{"finetune": {"2shot": {"base_lr": 1e-2}}}, {"seed": 1}], ids=["recipe", "seed"])
def test_fine_tuning_by_another_recipe_or_seed_is_trained(
    project: Path, computed: list[str], changes: dict[str, Any]
) -> None:
    write(changes)
    lgp("finetune", "random", "2shot")
    write({})
    assert computed == ["finetune"]


def test_damaged_outcome_is_computed_anew(project: Path, computed: list[str]) -> None:
    (project / ".lgp" / "outcomes" / "random-fewshot-1pct.parquet").write_bytes(b"torn")
    lgp("fewshot", "random", "1shot")
    assert computed == ["fewshot"]


def test_outcome_of_a_name_with_images_of_its_own_is_not_kept(project: Path) -> None:
    lgp("fewshot", "random", "3shot")
    assert not list((project / ".lgp" / "outcomes").glob("*3shot*"))
