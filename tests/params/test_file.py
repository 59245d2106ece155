"""The parameter file: what is refused, and how the message helps."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, merged

from lgp.errors import LgpError
from lgp.params.file import load_params


def load(tmp_path: Path, values: dict[str, Any]) -> Any:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_params(path)


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_is_valid(preset: Path) -> None:
    load_params(preset)


def test_committed_params_are_the_default_preset() -> None:
    assert (ROOT / "params.yaml").read_text() == (ROOT / "presets" / "digits.yaml").read_text()


def test_exponent_without_dot_is_a_number(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "params.yaml"
    text = yaml.safe_dump(merged(values, {"mim": {"base_lr": "RATE"}})).replace("RATE", "1e-3")
    assert yaml.safe_load(text)["mim"]["base_lr"] == "1e-3"  # what PyYAML makes of it
    path.write_text(text)
    assert load_params(path).mim.base_lr == 0.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mim": {"mask_ration": 0.5}}, "unknown key 'mim.mask_ration': did you mean 'mask_ratio'?"),
        ({"mimm": {}}, "unknown key 'mimm': did you mean 'mim'?"),
        ({"mim": {"mask_ratio": 1.5}}, "mim.mask_ratio: 1.5 is not valid: input should be less than 1"),
        ({"mim": {"mask_ratio": 0.95}}, "leaves none of the 16 patches"),
        ({"mim": {"epochs": 0}}, "mim.epochs: 0 is not valid: input should be greater than or equal to 1"),
        ({"mim": {"warmup_epochs": 2}}, "warmup_epochs 2 must be below epochs 2"),
        ({"cl": {"base_lr": float("nan")}}, "cl.base_lr: nan is not valid"),
        ({"model": {"patch_size": 3}}, "model.patch_size 3 does not divide data.image_size 8"),
        ({"model": {"patch_size": 1}}, "into patches of two values or more: choose one of [2, 4, 8]"),
        ({"few_labels": ["5pct"]}, "few_labels names 5pct, valid are 10pct, 1pct: choose of these, or add a share"),
        ({"few_labels": ["1pct", "1pct"]}, "few_labels names 1pct twice"),
        ({"finetuned": ["all"]}, "finetuned names all, but there is no recipe finetune.all: add it"),
        ({"data": {"few_label_lists": {"1pct": "list.txt"}}}, "name 1pct twice"),
        ({"data": {"few_label_shots": [5, 5]}}, "name 5shot twice"),
        ({"data": {"few_label_lists": {"all": "list.txt"}}}, "all means all labels: call the share or list otherwise"),
        ({"finetune": {"10pct": {"epoch": 3}}}, "unknown key 'finetune.10pct.epoch': did you mean 'epochs'?"),
        ({"features": {"blocks": 9}}, "features.blocks 9 is more than model.depth 3"),
        ({"mim": {"epochs": "1.5"}}, "mim.epochs: '1.5' is not valid"),
        ({"model": {"depth": 4}}, "model.depth 4 cannot be cut into the 3 equal groups of graft.stage_lr.base_lrs"),
        ({"model": {"heads": 3}}, "heads 3 do not divide width 16"),
        ({"data": {"mean": [0.5, 0.5, 0.5]}}, "mean has 3 values for 1 channels"),
        ({"seed": None}, "seed: None is not valid"),
    ],
)
def test_mistake_is_named_with_what_is_valid(
    tmp_path: Path, values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(LgpError) as error:
        load(tmp_path, merged(values, change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_exponent_is_a_whole_number_where_one_is_wanted(tmp_path: Path, values: dict[str, Any]) -> None:
    assert load(tmp_path, merged(values, {"mim": {"epochs": "1e2"}})).mim.epochs == 100


def test_missing_section_and_missing_file_are_named(tmp_path: Path, values: dict[str, Any]) -> None:
    del values["graft"]
    with pytest.raises(LgpError, match="missing key 'graft'"):
        load(tmp_path, values)
    with pytest.raises(LgpError, match="lgp preset use digits"):
        load_params(tmp_path / "absent.yaml")


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("seed: [1\nmim: }")
    with pytest.raises(LgpError, match=r"is not valid YAML, line 2, column [0-9]+: ") as error:
        load_params(path)
    assert "\n" not in str(error.value)


def test_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("seed: 0\nmim:\n  epochs: 1\n  epochs: 2\n")
    with pytest.raises(LgpError, match="line 4, column 3: the key 'epochs' twice"):
        load_params(path)
