"""The comparison over seeds: equal trials for every arm, and one version of the code."""

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
from scipy.stats import ttest_1samp

from lgp.params.file import Params
from lgp.pretrain.plan import stage_cost


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("seeds", ROOT / "benchmarks" / "seeds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "seeds", module)  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def test_results_of_another_version_of_the_code_are_refused(seeds: ModuleType, tmp_path: Path) -> None:
    seeds.check_code(tmp_path / "results", "one")
    seeds.check_code(tmp_path / "results", "one")
    (tmp_path / "unknown" / "seed5-mim").mkdir(parents=True)
    for folder, version in (("results", "another"), ("unknown", "one")):
        with pytest.raises(SystemExit, match="another version of the code: remove it"):
            seeds.check_code(tmp_path / folder, version)


def chosen(seeds: ModuleType, variants: list[str], code: str) -> None:
    """Each variant has a rate of its own, the number of its place, and another that was not chosen."""
    places = {v: seeds.TUNED.index(v) + 1 for v in variants}
    rows = [{"variant": v, "rate": n + r, "chosen": not r, "code": code} for v, n in places.items() for r in (0.0, 0.5)]
    pd.DataFrame(rows).to_csv(seeds.TUNING, index=False)


def test_rates_that_are_missing_are_named_and_those_of_other_code_told(
    seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seeds, "TUNING", tmp_path / "tuning.csv")
    with pytest.raises(SystemExit, match="run with --tune mim cl cl_vicreg graft"):
        seeds.tuned_rates("one", list(seeds.VARIANTS))
    chosen(seeds, [name for name in seeds.TUNED if name != "cl"], "one")
    with pytest.raises(SystemExit, match="no rates of cl: run with --tune cl first"):
        seeds.tuned_rates("one", list(seeds.VARIANTS))
    chosen(seeds, seeds.TUNED, "one")
    plain = {name: name.removesuffix("_small").removesuffix("_warm") for name in seeds.TRAINED}
    rates = {name: seeds.TUNED.index(of) + 1 for name, of in plain.items()}
    assert seeds.tuned_rates("one", list(seeds.VARIANTS)) == rates | {seeds.PIXELS: 0}
    assert seeds.tuned_rates("one", ["graft_swav_warm"]) == {n: rates[n] for n in ("mim", "graft_swav_warm")}
    assert capsys.readouterr().out == ""
    seeds.tuned_rates("another", list(seeds.VARIANTS))
    assert "mim, cl, cl_vicreg, graft" in capsys.readouterr().out


def test_version_is_of_every_stage(seeds: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = dict.fromkeys(seeds.STAGES, "one")
    versions = set()
    for stage in (None, *seeds.STAGES):
        monkeypatch.setattr(seeds, "code_digests", lambda _root, stage=stage: digests | {stage: "another"})
        versions.add(seeds.version_of_code())
    assert len(versions) == len(seeds.STAGES) + 1


def test_every_stage_of_the_comparison_has_a_code_digest(seeds: ModuleType) -> None:
    assert set(seeds.STAGES) <= seeds.code_digests(ROOT).keys()


def params_of(seeds: ModuleType, changes: dict[str, dict[str, Any]]) -> Params:
    values = seeds.preset()
    for section, keys in changes.items():
        values[section] |= keys
    return Params.model_validate(values)


def test_a_variant_changes_its_arm_and_the_contrastive_section_alone(seeds: ModuleType) -> None:
    assert seeds.changes_of(seeds.PIXELS, 0.5) == {}  # nothing is trained
    for name in seeds.TRAINED:
        variant = seeds.VARIANTS[name]
        changed = seeds.changes_of(name, 0.5)
        assert changed.keys() <= {variant.arm, "contrastive"}
        params = params_of(seeds, changed)
        if variant.arm == "graft":
            assert params.graft.stage_lr is not None
            lower = 0.05 if name in ("graft", "graft_small", "graft_warm") else 0.5
            assert params.graft.stage_lr.base_lrs == [lower, lower, 0.5]
            assert params.graft.head_warmup_epochs == (5 if name.endswith("_warm") else 0)
        else:
            assert getattr(params, variant.arm).base_lr == 0.5
        assert (params.contrastive.small_views is not None) == name.endswith("_small")
        if variant.rate_of:
            assert seeds.VARIANTS[variant.rate_of].contrastive.items() <= variant.contrastive.items()


def compute(seeds: ModuleType, arm: str, changes: dict[str, dict[str, Any]]) -> float:
    params = params_of(seeds, changes)
    epochs, warmup = getattr(params, arm).epochs, params.graft.head_warmup_epochs if arm == "graft" else 0
    heads = stage_cost(arm, params, heads_only=True).flops_per_image if warmup else 0
    return epochs * stage_cost(arm, params).flops_per_image + warmup * heads


def test_variants_have_the_compute_of_their_arm_in_the_preset(seeds: ModuleType) -> None:
    of_arm = {arm: compute(seeds, arm, {}) for arm in ("mim", "cl", "graft")}
    found = {name: compute(seeds, seeds.VARIANTS[name].arm, seeds.changes_of(name, 0.5)) for name in seeds.TRAINED}
    assert found == {name: pytest.approx(of_arm[seeds.VARIANTS[name].arm], rel=0.01) for name in seeds.TRAINED}


def test_the_tuned_variants_are_fine_tuned_and_pixels_never(
    seeds: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        asked: list[Any] = []
        patch.setattr(seeds, "check_code", lambda *_: None)
        patch.setattr(seeds, "load_libraries", lambda: None)
        patch.setattr(seeds, "tuned_rates", lambda *_: {})
        patch.setattr(seeds, "seeds_of", lambda *given: asked.append(given[4]) or sys.exit())
        for words, expected in (([], seeds.TUNED), (["--fine-tuned", "cl_small"], ["cl_small"])):
            patch.setattr(sys, "argv", ["seeds.py", "folder", *words])
            with pytest.raises(SystemExit):
                seeds.main()
            assert asked.pop() == expected
        patch.setattr(sys, "argv", ["seeds.py", "folder", "--fine-tuned", seeds.PIXELS])
        with pytest.raises(SystemExit):
            seeds.main()
    assert "invalid choice: 'pixels'" in capsys.readouterr().err


def test_seeds_that_chose_the_rates_are_not_reported(
    seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not set(seeds.TUNED_ON) & set(seeds.SEEDS)
    monkeypatch.setattr(sys, "argv", ["seeds.py", str(tmp_path), "--seeds", "0", "5"])
    with pytest.raises(SystemExit):
        seeds.main()
    assert "seeds 0, 1 chose the rates" in capsys.readouterr().err


def test_every_variant_has_the_same_trials_and_the_best_on_val_is_chosen(
    seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def all_results(_root: Path, trials: list[Any], _jobs: int) -> list[Any]:
        tried.extend(trial for trial, _ in trials)
        best = {"mim": 8e-3, "cl": 1.6e-2}
        tops = [trial.seed - 1000 * abs(trial.rate - best.get(trial.name, 4e-3)) for trial, _ in trials]
        return [{task: {"val/top1": top} for task in tasks} for top, (_, tasks) in zip(tops, trials, strict=True)]

    monkeypatch.setattr(seeds, "all_results", all_results)
    tuning = seeds.tune(tmp_path, seeds.TUNED, None, 1)
    chosen = tuning[tuning["chosen"]].set_index("variant")["rate"].to_dict()
    assert chosen == dict.fromkeys(seeds.TUNED, 4e-3) | {"mim": 8e-3, "cl": 1.6e-2}
    for name in seeds.TUNED:
        assert [(t.rate, t.seed) for t in tried if t.name == name] == [
            (rate, seed) for rate in seeds.RATES for seed in seeds.TUNED_ON
        ]
    assert {t.mim for t in tried if t.name != "mim"} == {8e-3}
    tried.clear()
    seeds.tune(tmp_path, ["graft"], 4e-3, 1)
    assert {(t.name, t.mim) for t in tried} == {("graft", 4e-3)}


def test_trial_that_does_not_train_is_lost(seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise subprocess.CalledProcessError(1, "lgp cl")

    monkeypatch.setattr(seeds, "project", lambda *_: tmp_path)
    monkeypatch.setattr(seeds, "metrics_of", failing)
    found = seeds.results_of(tmp_path, seeds.Trial("cl", 1e3, 0, 8e-3), seeds.CHOSEN_BY)
    assert found is None
    assert seeds.on_val(found) == 0


def test_graft_takes_images_and_the_mae_of_its_seed(
    seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(seeds, "project", lambda *args: made.append(args) or args[0])
    monkeypatch.setattr(seeds, "metrics_of", lambda *_: {})
    for name in ("graft_vicreg", "cl"):
        seeds.results_of(tmp_path, seeds.Trial(name, 4e-3, 12, 8e-3), ())
    of_graft, of_cl = made
    assert of_graft[1] == of_cl[1] == 12
    assert of_graft[3] == {"data": tmp_path / "seed12", "models/mim": tmp_path / "seed12-mim-0.008"}
    assert of_cl[3] == {"data": tmp_path / "seed12", "models/mim": None}


def test_page_leaves_out_what_was_not_measured(seeds: ModuleType) -> None:
    measures = [label for label in seeds.MEASURES if "10 %" not in label]
    rows = [
        {"variant": name, "seed": seed, **dict.fromkeys(measures, 70.0 + seed + 5 * (name == "cl_vicreg"))}
        for name, seed in (("cl_vicreg", 12), ("cl_vicreg", 13), ("mim", 12), ("mim", 13))
    ]
    columns = pd.DataFrame(rows).assign(**{f"10 %{how}": 50.0 for how in ("", ", propagated", ", selected", ", both")})
    page = seeds.page(columns)
    assert "fine-tuned" not in page
    assert "| `cl_vicreg` over `mim` | **+5.0 ± 0.0** |" in page


def test_differences_are_decided_by_paired_t_tests_that_holm_adjusts_in_each_column(seeds: ModuleType) -> None:
    rng = np.random.default_rng(0)
    clear, chance = [[float(v) for v in mean + rng.normal(size=5)] for mean in (2.5, 0.0)]
    p = seeds.p_of_tie(clear)
    assert p == pytest.approx(ttest_1samp(clear, 0).pvalue)
    assert (seeds.p_of_tie([1.0, 1.0]), seeds.p_of_tie([0.0, 0.0])) == (0, 1)
    rows = max(2, int(0.05 / p) + 1)  # so many comparisons that it is undecided
    many = [[clear]] + [[chance]] * (rows - 1)
    assert seeds.decided([[clear], [chance]]).tolist() == [[True], [False]]
    assert not seeds.decided(many).any()
    lacking = [[clear], [[np.nan] * 5]]
    assert seeds.decided(lacking).tolist() == [[True], [False]]
    assert seeds.marked(lacking)[0][0].startswith("**+")
    assert seeds.marked(lacking)[1][0] == "–"
