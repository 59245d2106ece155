"""The comparison over seeds: equal trials for every arm, and one version of the code."""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from lgp.params.file import Params


@pytest.fixture
def seeds() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seeds", ROOT / "benchmarks" / "seeds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_of_another_version_of_the_code_are_refused(seeds: ModuleType, tmp_path: Path) -> None:
    seeds.check_code(tmp_path / "results", "one")
    seeds.check_code(tmp_path / "results", "one")
    (tmp_path / "unknown" / "seed5-mim").mkdir(parents=True)
    for folder, version in (("results", "another"), ("unknown", "one")):
        with pytest.raises(SystemExit, match="another version of the code: remove it"):
            seeds.check_code(tmp_path / folder, version)


def test_rates_that_other_code_chose_are_refused(
    seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeds, "TUNING", tmp_path / "tuning.csv")
    with pytest.raises(SystemExit, match="run with --tune first"):
        seeds.tuned_rates("one")
    rows = {"variant": ["cl", "cl"], "rate": [0.1, 0.2], "chosen": [False, True], "code": ["one", "one"]}
    pd.DataFrame(rows).to_csv(seeds.TUNING, index=False)
    assert seeds.tuned_rates("one") == {"cl": 0.2}
    with pytest.raises(SystemExit, match="of another version of the code: run with --tune again"):
        seeds.tuned_rates("another")


def test_version_is_of_every_stage(seeds: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = dict.fromkeys(seeds.STAGES, "one")
    versions = set()
    for stage in (None, *seeds.STAGES):
        monkeypatch.setattr(seeds, "code_digests", lambda _root, stage=stage: digests | {stage: "another"})
        versions.add(seeds.version_of_code())
    assert len(versions) == len(seeds.STAGES) + 1


def test_every_stage_of_the_comparison_has_a_code_digest(seeds: ModuleType) -> None:
    assert set(seeds.STAGES) <= seeds.code_digests(ROOT).keys()


def test_a_trial_changes_the_rate_of_its_arm_alone(seeds: ModuleType) -> None:
    preset = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text())
    assert seeds.changes_of(seeds.PIXELS, 0.5) == {}  # nothing is trained
    for variant in itertools.chain(*seeds.STEPS):
        of_arm = seeds.changes_of(variant, 0.5)
        assert of_arm.keys() == {seeds.arm_of(variant)}
        changed = preset | {arm: preset[arm] | keys for arm, keys in of_arm.items()}
        params = Params.model_validate(changed)
        if seeds.arm_of(variant) == "graft":
            assert params.graft.stage_lr is not None
            lower = 0.05 if variant == "graft" else 0.5
            assert params.graft.stage_lr.base_lrs == [lower, lower, 0.5]
        else:
            assert getattr(params, variant).base_lr == 0.5


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
    tried: list[tuple[str, float, float, int]] = []

    def validated(_root: Path, trial: tuple[str, float, int], best_mim: float) -> float:
        variant, rate, seed = trial
        tried.append((variant, rate, best_mim, seed))
        return seed - 1000 * abs(rate - {"mim": 8e-3, "cl": 1.6e-2}.get(variant, 4e-3))

    monkeypatch.setattr(seeds, "validated", validated)
    monkeypatch.setattr(seeds, "project", lambda *_: None)
    tuning = seeds.tune(tmp_path, 1)
    chosen = tuning[tuning["chosen"]].set_index("variant")["rate"]
    assert chosen.to_dict() == {"mim": 8e-3, "cl": 1.6e-2, "graft": 4e-3, "graft_one_rate": 4e-3}
    assert set(itertools.chain(*seeds.STEPS)) | {seeds.PIXELS} == set(seeds.VARIANTS)
    for variant in itertools.chain(*seeds.STEPS):
        assert [(rate, seed) for v, rate, _, seed in tried if v == variant] == [
            (rate, seed) for rate in seeds.RATES for seed in seeds.TUNED_ON
        ]
    assert {best for variant, _, best, _ in tried if variant.startswith("graft")} == {8e-3}


def test_trial_that_does_not_train_is_lost(seeds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise subprocess.CalledProcessError(1, "lgp cl")

    monkeypatch.setattr(seeds, "project", lambda *_: None)
    monkeypatch.setattr(seeds, "metrics_of", failing)
    assert seeds.validated(tmp_path, ("cl", 1e3, 0), 8e-3) == 0
