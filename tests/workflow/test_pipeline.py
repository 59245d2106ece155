"""dvc.yaml: what each stage depends on, and what runs again when a key changes."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, merged

from lgp.workflow.provenance import SURROUNDINGS, modules_used

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CONTROLS = yaml.safe_load((ROOT / "controls" / "dvc.yaml").read_text())["stages"]
STAGES = PIPELINE | CONTROLS
ARMS = ("mim", "cl", "graft")
CHOICES = {"${arms}": ARMS, "${few_labels}": ("1pct", "10pct"), "${finetuned}": ("10pct",)}
DVC = [str(Path(sys.executable).with_name("dvc"))]

EVALUATIONS = [f"{task}@{arm}{share}" for arm in (*ARMS, "joint", "reverse") for task, share in
               (("linear", ""), ("fewshot", "-1pct"), ("fewshot", "-10pct"), ("finetune", "-10pct"))]  # fmt: skip


def of_arm(*arms: str) -> set[str]:
    return {stage for stage in EVALUATIONS for arm in arms if stage.split("@")[1].split("-")[0] == arm}


FEWSHOT = {s for s in of_arm(*ARMS) if s.startswith("fewshot")}
FINETUNE = {s for s in of_arm(*ARMS) if s.startswith("finetune")}
LINEAR = {s for s in of_arm(*ARMS) if s.startswith("linear")}
ALL = {"prepare", "report", *ARMS} | of_arm(*ARMS)


@pytest.mark.parametrize("name", STAGES)
def test_code_dependencies_are_the_imports(name: str) -> None:
    listed = {d for d in STAGES[name]["deps"] if d.endswith(".py")}
    assert listed == {p.as_posix() for p in modules_used(Path("stages") / f"{name}.py", ROOT)}


def test_surroundings_exist() -> None:
    assert all((ROOT / path).is_file() for path in SURROUNDINGS)


@pytest.mark.parametrize("name", STAGES)
def test_parameter_dependencies_are_what_the_stage_digests(name: str) -> None:
    """The sections that a stage names (its digest, its tracked parameters) are those that DVC watches."""
    source = ast.parse((ROOT / "stages" / f"{name}.py").read_text())
    lists = [[_text(e) for e in node.elts] for node in ast.walk(source) if isinstance(node, ast.List)]
    assert STAGES[name]["params"] in lists


def _text(element: ast.expr) -> str:
    """Write a text as dvc.yaml has it: f"finetune.{labels}" is finetune.${item.labels}."""
    return ast.unparse(element).removeprefix("f").strip("'").replace("{", "${item.")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which DVC believes that everything ran."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("lgp", "stages", "controls"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    subprocess.run([*DVC, "init", "--no-scm", "--quiet"], cwd=folder, check=True)
    subprocess.run([*DVC, "config", "core.analytics", "false"], cwd=folder, check=True)
    for stage in PIPELINE.values():
        for item in _items(stage):
            for path in _outputs(stage):
                out = folder / _filled(path, item)
                if not out.suffix:
                    out.mkdir(parents=True)
                    for dep in (_filled(d, i) for s in STAGES.values() for i in _items(s) for d in s["deps"]):
                        if (folder / dep).is_relative_to(out) and folder / dep != out:
                            (folder / dep).parent.mkdir(parents=True, exist_ok=True)
                            (folder / dep).write_text(dep)
                    (out / "file").write_text(path)
                else:
                    out.parent.mkdir(parents=True, exist_ok=True)
                    out.write_text(str(out))
    subprocess.run([*DVC, "commit", "--force", "--quiet", "dvc.yaml"], cwd=folder, check=True)
    return folder


def _items(stage: dict[str, Any]) -> list[dict[str, str]]:
    items: list[dict[str, str]] = [{}]
    for key, choices in stage.get("matrix", {}).items():
        items = [{**item, key: choice} for item in items for choice in CHOICES[choices]]
    return items


def _filled(text: str, item: dict[str, str]) -> str:
    for key, value in item.items():
        text = text.replace("${item." + key + "}", value)
    return text.replace("${graft.start}", "mim").replace("${graft.end}", "mim")


def _outputs(stage: dict[str, Any]) -> list[str]:
    return [next(iter(o)) if isinstance(o, dict) else o for o in stage.get("outs", []) + stage.get("metrics", [])]


def would_run(folder: Path) -> set[str]:
    command = [*DVC, "repro", "--dry", "--force-downstream"]
    output = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    return {line.split("'")[1].split(":")[-1] for line in output.splitlines() if line.startswith("Running stage")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, set()),
        ({"fewshot": {"c_fixed": 0.5}}, FEWSHOT | {"report"}),
        ({"linear": {"knn_k": 5}}, LINEAR | {"report"}),
        ({"features": {"pool": "average"}}, FEWSHOT | LINEAR | {"report"}),
        ({"finetune": {"10pct": {"epochs": 7}}}, FINETUNE | {"report"}),
        ({"finetune": {"all": {"epochs": 7}}}, set()),
        ({"few_labels": ["1pct"]}, {"report"}),
        ({"finetuned": []}, {"report"}),
        ({"graft": {"epochs": 7}}, {"graft", "report"} | of_arm("graft")),
        ({"cl": {"epochs": 7}}, {"cl", "report"} | of_arm("cl")),
        ({"mim": {"epochs": 7}}, {"mim", "graft", "report"} | of_arm("mim", "graft")),
        ({"contrastive": {"temperature": 0.1}}, {"cl", "graft", "report"} | of_arm("cl", "graft")),
        ({"graft": {"policy": ["layer_decay"]}}, {"graft", "report"} | of_arm("graft")),
        ({"graft": {"end": "cl", "policy": ["stage_lr", "cl_end"]}}, {"graft", "report"} | of_arm("graft")),
        ({"report": {"baselines": ["pixels"]}}, {"report"}),
        ({"joint": {"epochs": 7}}, set()),
        ({"arms": ["mim", "cl"]}, {"report"}),
        ({"arms": [*ARMS, "joint"]}, {"joint", "report"} | of_arm("joint")),
        ({"arms": [*ARMS, "reverse"], "cl": {"epochs": 7}}, {"cl", "reverse", "report"} | of_arm("cl", "reverse")),
        ({"model": {"depth": 9}}, ALL - {"prepare"}),
        ({"data": {"val_share": 0.2}}, ALL),
        ({"seed": 1}, ALL),
        ({"run": {"workers": 2, "device": "cpu", "tracking_uri": "http://127.0.0.1:5000"}}, set()),
    ],
    ids=lambda value: "-".join(value) or "nothing" if isinstance(value, dict) else "",
)
def test_changed_key_runs_again_what_reads_it(finished: Path, change: dict[str, Any], expected: set[str]) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    (finished / "params.yaml").write_text("# a comment\n" + yaml.safe_dump(merged(values, change)))
    assert would_run(finished) == expected
