"""The comparison of MAE lengths: every graft starts from its own MAE, and holds its lower blocks back as asked."""

import importlib.util
import subprocess
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


@pytest.fixture
def made(lengths: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the projects that are made. Each metric of an arm has a value of its own; a ratio of 0.3 fails."""
    made = list[Any]()

    def project(folder: Path, *given: Any) -> Path:
        made.append((folder, *given))
        return folder

    def metrics_of(folder: Path, arm: str, tasks: tuple[str, ...]) -> dict[str, dict[str, str]]:
        if "q0.3" in folder.name:
            raise subprocess.CalledProcessError(1, "lgp graft")
        keys = ("test/top1", "test/knn_top1", "val/top1")
        return {task: {key: f"{folder.name} {arm} {task} {key}" for key in keys} for task in tasks}

    monkeypatch.setattr(lengths.seeds, "project", project)
    monkeypatch.setattr(lengths.seeds, "metrics_of", metrics_of)
    return made


def test_grafts_start_from_the_mae_of_their_seed_depth_and_length(
    lengths: ModuleType, made: list[Any], tmp_path: Path
) -> None:
    start = lengths.Start(12, 6, 480)
    grafts = [lengths.Graft(*of) for of in (("mocov3", 1, 1.6e-2), ("mocov3", 0.1, 1.6e-2), ("vicreg", 1, 4e-3))]
    lengths.rows_of(tmp_path, start, grafts)
    mim, *others = made
    assert len({folder for folder, *_ in made}) == 4
    assert {seed for _, seed, *_ in made} == {12}
    assert [changes for _, _, changes, _ in made] == [start.changes(), *(graft.changes(start) for graft in grafts)]
    assert mim[3] == {"data": tmp_path / "seed12"}
    assert [shared for *_, shared in others] == [{"data": tmp_path / "seed12", "models/mim": mim[0]}] * 3
    assert start.changes()["run"] == {"precision": "auto"}


def test_rows_have_the_measures_of_their_own_arm(
    lengths: ModuleType, made: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = lengths.Start(12, 6, 480)
    mim, graft = lengths.rows_of(tmp_path, start, [lengths.Graft("mocov3", ratio, 1.6e-2) for ratio in (0.3, 0.1)])
    assert "q0.3-0.016: failed, see" in capsys.readouterr().out
    assert "ratio" not in mim
    assert (graft["seed"], graft["depth"], graft["epochs"], graft["ratio"]) == (12, 6, 480, 0.1)
    for row, name in ((mim, f"{made[0][0].name} mim"), (graft, f"{made[2][0].name} graft")):
        assert row["k-NN"] == f"{name} linear test/knn_top1"
        assert row["linear"] == f"{name} linear test/top1"
        assert row["10 %"] == f"{name} fewshot-10pct test/top1"
        assert row["1 %, propagated"] == f"{name} propagate-1pct test/top1"
        assert row["1 %, both"] == f"{name} selected-1pct-propagated test/top1"
        assert row["1 %, val"] == f"{name} fewshot-1pct val/top1"


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--depths", "4"], "multiples of 3"), (["--ratios", "2"], "from 0 to 1"), (["--seeds", "0"], "chose the rates")],
)
def test_what_cannot_be_compared_is_refused(
    words: list[str],
    said: str,
    lengths: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["mae_length.py", str(tmp_path / "new"), *words])
    with pytest.raises(SystemExit):
        lengths.main()
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_every_mae_is_trained_once_with_all_grafts_and_the_table_keeps_other_rows(
    lengths: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Any]()

    def all_rows(_root: Path, starts: set[Any], grafts: list[Any], jobs: int) -> pd.DataFrame:
        asked.append((starts, grafts, jobs))
        return pd.DataFrame([vars(start) | vars(graft) | {"1 %": 60} for start in starts for graft in grafts])

    monkeypatch.setattr(lengths, "OUT", tmp_path / "table.csv")
    monkeypatch.setattr(lengths, "all_rows", all_rows)
    monkeypatch.setattr(lengths.seeds, "load_libraries", lambda: None)
    of_vicreg = ["--epochs", "120", "--ratios", "1", "--objectives", "vicreg", "--rates", "0.1", "0.2"]
    for words in (["--epochs", "60", "60", "--ratios", "1", "0.1"], of_vicreg):
        monkeypatch.setattr(sys, "argv", ["mae_length.py", str(tmp_path / "new"), "--depths", "6", *words])
        lengths.main()
    (starts, grafts, _), (_, others, _) = asked
    assert starts == {lengths.Start(12, 6, 60)}
    assert grafts == [lengths.Graft("mocov3", ratio, 1.6e-2) for ratio in (1, 0.1)]
    assert others == [lengths.Graft("vicreg", 1, rate) for rate in (0.1, 0.2)]
    table = pd.read_csv(tmp_path / "table.csv")
    assert table[["epochs", "ratio"]].to_numpy().tolist() == [[60, 0.1], [60, 1], [120, 1], [120, 1]]
    assert table["code"].nunique() == 1


def test_newer_rows_take_the_place_of_the_same_arms(lengths: ModuleType) -> None:
    def rows(ratios: list[float], top1: float) -> pd.DataFrame:
        of_graft = {"objective": "mocov3", "rate": 0.016}
        start = {"seed": 12, "depth": 6, "epochs": 60, "1 %": top1}
        return pd.DataFrame([start, *(start | of_graft | {"ratio": ratio} for ratio in ratios)])

    merged = lengths.merged(rows([0.1, 1], 50), rows([0.3, 1], 60))
    assert merged["ratio"].tolist() == pytest.approx([np.nan, 0.1, 0.3, 1], nan_ok=True)
    assert merged["1 %"].tolist() == [60, 50, 60, 60]
