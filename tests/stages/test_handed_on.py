"""What the stages of few labels hand on: features, subsets, sections and the device of the run."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT

from lgp.params.file import Params

DEVICE = torch.device("meta")  # no device of this machine
CALLED = {"fewshot": ["evaluate_fewshot"], "propagate": ["evaluate_propagation"]}
CALLED["selected"] = [*CALLED["fewshot"], *CALLED["propagate"]]


@pytest.mark.parametrize("stage", CALLED)
def test_evaluations_get_features_subsets_sections_and_device(
    stage: str, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, tuple[Any, ...]] = {}

    def recording(name: str, result: Any) -> Callable[..., Any]:
        return lambda *about: asked.update({name: about}) or result

    @contextmanager
    def evaluation(*_: Any) -> Iterator[SimpleNamespace]:
        data = SimpleNamespace(labelled=lambda labels: [f"random {labels}"])
        yield SimpleNamespace(
            run=SimpleNamespace(params=params),
            encoder=Path("encoder"),
            data=data,
            outcome=lambda _labels, _settings, compute: compute(),
            publish=lambda outcome: None,
        )

    module = import_module(f"stages.{stage}")
    monkeypatch.setattr(module, "evaluation", evaluation)
    monkeypatch.setattr(module, "check_labels", lambda labels: None)
    monkeypatch.setattr("lgp.compute.device.choose_device", lambda run: DEVICE if run is params.run else None)
    monkeypatch.setattr("lgp.features.of_encoder.encoder_features", recording("features", "features"))
    monkeypatch.setattr("lgp.evaluate.selection.selected_subsets", recording("selected", ["chosen"]))
    for name in ("evaluate_fewshot", "evaluate_propagation"):
        monkeypatch.setattr(f"lgp.evaluate.few_labels.{name}", recording(name, "outcome"))
    getattr(module, stage)("graft", "1pct")
    folder, _, of_run, device = asked["features"]
    assert (folder, of_run is params, device) == (Path("encoder"), True, DEVICE)
    subsets = ["chosen"] if stage == "selected" else ["random 1pct"]
    sections = {
        "evaluate_fewshot": (params.fewshot,),
        "evaluate_propagation": (params.fewshot, params.propagation),
    }
    for name in CALLED[stage]:
        assert asked[name] == ("features", subsets, *sections[name], DEVICE)
    assert asked.keys() == {"features", *CALLED[stage], *(["selected"] if stage == "selected" else [])}


def test_usage_errors_name_the_command_and_not_its_file() -> None:
    line = [sys.executable, str(ROOT / "cli.py"), "init", "one", "another"]
    failed = subprocess.run(line, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("Usage: lgp init ")
