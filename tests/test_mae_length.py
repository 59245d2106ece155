"""The comparison of MAE lengths: every graft starts from its own MAE, and holds its lower blocks back as asked."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from lgp.params.file import Params


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("seeds", "mae_length"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


def params_of(lengths: ModuleType, changes: dict[str, dict[str, Any]]) -> Params:
    values = lengths.seeds.preset()
    for section, keys in changes.items():
        values[section] |= keys
    return Params.model_validate(values)


@pytest.mark.parametrize(("objective", "epochs"), [("mocov3", 60), ("vicreg", 80)])
@pytest.mark.parametrize("depth", [6, 12])
def test_ratio_is_of_the_rates_of_the_lower_two_thirds(
    objective: str, epochs: int, depth: int, lengths: ModuleType
) -> None:
    start = lengths.Start(12, depth, 480)
    params = params_of(lengths, lengths.Graft(objective, 0.1, 4e-3).changes(start))
    assert params.graft.policy == ("stage_lr",)
    assert params.graft.stage_lr is not None
    assert params.graft.stage_lr.base_lrs == pytest.approx([4e-4, 4e-4, 4e-3])
    assert (params.contrastive.objective, params.graft.epochs) == (objective, epochs)
    assert (params.model.depth, params.mim.epochs, params.mim.base_lr) == (depth, 480, 8e-3)
    frozen = params_of(lengths, lengths.Graft(objective, 0, 4e-3).changes(start))
    assert frozen.graft.policy == ("stage_lr", "freeze")
    assert frozen.graft.stage_lr is not None
    assert frozen.graft.freeze is not None
    assert frozen.graft.stage_lr.base_lrs == [4e-3]
    assert frozen.graft.freeze.lower_blocks == 2 * depth // 3


def test_grafts_start_from_the_mae_of_their_seed_depth_and_length(
    lengths: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trained = list[Any](), list[tuple[Path, str]]()

    def project(*given: Any) -> Path:
        made.append(given)
        folder: Path = given[0]
        return folder

    def metrics_of(folder: Path, arm: str, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
        trained.append((folder, arm))
        return {task: dict.fromkeys(("test/top1", "test/knn_top1", "val/top1"), 50.0) for task in tasks}

    monkeypatch.setattr(lengths.seeds, "project", project)
    monkeypatch.setattr(lengths.seeds, "metrics_of", metrics_of)
    start = lengths.Start(12, 6, 480)
    grafts = [lengths.Graft(*of) for of in (("mocov3", 1, 1.6e-2), ("mocov3", 0.1, 1.6e-2), ("vicreg", 1, 4e-3))]
    rows = pd.DataFrame(lengths.rows_of(tmp_path, start, grafts))
    mim, *others = made
    assert [folder for folder, *_ in made] == [folder for folder, _ in trained]
    assert len({folder for folder, *_ in made}) == 4
    assert {seed for _, seed, *_ in made} == {12}
    assert [arm for _, arm in trained] == ["mim", "graft", "graft", "graft"]
    assert mim[3] == {"data": tmp_path / "seed12"}
    assert [shared for *_, shared in others] == [{"data": tmp_path / "seed12", "models/mim": mim[0]}] * 3
    assert rows["ratio"].tolist() == pytest.approx([np.nan, 1, 0.1, 1], nan_ok=True)
    assert rows[list(lengths.MEASURES)].to_numpy().tolist() == [[50.0] * len(lengths.MEASURES)] * 4


def test_newer_rows_take_the_place_of_the_same_arms(lengths: ModuleType) -> None:
    def rows(ratios: list[float], top1: float) -> pd.DataFrame:
        of_graft = {"objective": "mocov3", "rate": 0.016}
        start = {"seed": 12, "depth": 6, "epochs": 60, "1 %": top1}
        return pd.DataFrame([start, *(start | of_graft | {"ratio": ratio} for ratio in ratios)])

    merged = lengths.merged(rows([0.1, 1], 50), rows([0.3, 1], 60))
    assert merged["ratio"].tolist() == pytest.approx([np.nan, 0.1, 0.3, 1], nan_ok=True)
    assert merged["1 %"].tolist() == [60, 50, 60, 60]
