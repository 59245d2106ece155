"""The parameter file: what is refused, and how the message helps."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, merged

from lgp.errors import LgpError
from lgp.params.file import MOVED, Params, load_params, restricted, section_values


def load(tmp_path: Path, values: dict[str, Any]) -> Any:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_params(path)


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_is_valid(preset: Path) -> None:
    load_params(preset)


def test_committed_params_are_the_default_preset() -> None:
    assert (ROOT / "params.yaml").read_text() == (ROOT / "presets" / "digits.yaml").read_text()


def test_papers_preset_differs_from_the_default_in_the_graft_alone() -> None:
    """A key that one of them leaves out would run stages again, though its value is the default."""
    paper, default = (yaml.safe_load((ROOT / "presets" / f"{n}.yaml").read_text()) for n in ("digits-paper", "digits"))
    assert paper.keys() == default.keys()
    differing = {
        f"{section}.{key}"
        for section in ("contrastive", "cl", "graft", "fewshot", "run", "mim", "finetune", "linear")
        for key in paper[section].keys() | default[section].keys()
        if paper[section].get(key, "missing") != default[section].get(key, "missing")
    }
    of_graft = {"graft.epochs", "graft.stage_lr", "graft.layer_decay"}
    assert differing == {"contrastive.objective", "cl.epochs", "cl.base_lr"} | of_graft


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
        ({"few_labels": ["5pct"]}, "few_labels names 5pct, valid are 10pct, 1pct, all: choose of these, or"),
        ({"few_labels": ["1pct", "1pct"]}, "few_labels names 1pct twice"),
        ({"data": {"source": {"foldr": "x"}}}, "yaml: unknown key 'data.source.foldr': did you mean 'folder'?"),
        ({"data": {"source": ["a", {"where": "x"}]}}, "yaml: unknown key 'data.source.1.where': valid: folder, csv,"),
        ({"data": {"source": {"folder": "x", "csv": "y"}}}, "yaml: data.source: a source has one of folder, csv,"),
        ({"data": {"source": {"folder": 3}}}, "yaml: data.source.folder: 3 is not valid: input should be a valid str"),
        ({"data": {"source": 5}}, "yaml: data.source: 5 is not valid: give a path, a name or a mapping such as {fol"),
        (
            {"finetune": {"10pct": {"base_lr": -1}}},
            "yaml: finetune.10pct.base_lr: -1 is not valid: input should be gre",
        ),
        ({"finetune": {"10pct": {"base_lr": ["x"]}}}, "yaml: finetune.10pct.base_lr.0: 'x' is not valid: input"),
        ({"finetuned": ["all"]}, "finetuned names all, but there is no recipe finetune.all: add it"),
        ({"semi_supervised": ["1pct"]}, "semi_supervised names 1pct, which is not among finetuned, and it starts from"),
        (
            {"semi_supervised": ["10pct"], "semi": None},
            "semi_supervised names 10pct, but there is no section semi: add",
        ),
        (
            {"semi": {"unlabelled_ratio": 1, "mixing": "both"}},
            "semi: mixing both needs an unlabelled_ratio of 2 or more",
        ),
        (
            {"semi": {"rand_augment": "much"}},
            "semi.rand_augment: 'much' is not valid: give timm's description, like ra",
        ),
        ({"labels": {"lists": {"1pct": "list.txt"}}}, "name 1pct twice"),
        ({"labels": {"shots": [5, 5]}}, "name 5shot twice"),
        ({"labels": {"lists": {"all": "list.txt"}}}, "all means all labels: call the share or list otherwise"),
        ({"data": {"leaks": "report"}}, "unknown key 'data.leaks': it is now labels.leaks"),
        ({"report": {}}, "unknown key 'report': it is now arms, which names pixels and random too"),
        ({"arms": ["mim", "mim", "cl", "graft"]}, "arms names mim twice"),
        ({"arms": ["pixels", "random"]}, "arms names only baselines (pixels, random): add mim, cl, graft"),
        ({"finetuned_arms": ["mim", "mim"]}, "finetuned_arms names mim twice"),
        ({"finetuned_arms": ["mae"]}, "finetuned_arms names mae, which is not among arms: add it there, or drop it"),
        ({"finetuned_arms": ["pixels"]}, "finetuned_arms names pixels, which has no encoder to fine-tune: drop it"),
        ({"arms": ["joint", "mim"], "finetuned_arms": ["mim"], "joint": None}, "there is no section joint: add it"),
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
    with pytest.raises(LgpError, match="make one with `lgp init FOLDER`"):
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


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_moved_key_is_hinted_with_its_new_place(tmp_path: Path, values: dict[str, Any], old: str) -> None:
    section, _, key = old.partition(".")
    with pytest.raises(LgpError) as error:
        load(tmp_path, merged(values, {section: {key: 1} if key else {"baselines": []}}))
    assert f"unknown key {old!r}: it is now {MOVED[old]}" in str(error.value)


@pytest.mark.parametrize("new", sorted(new for old, new in MOVED.items() if "." in old))
def test_every_new_place_of_a_moved_key_is_there(new: str) -> None:
    section, _, key = new.partition(".")
    assert key in Params.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


def test_an_arm_goes_through_the_tasks_of_its_kind(values: dict[str, Any]) -> None:
    params = Params.model_validate(
        merged(
            values,
            {
                "finetuned_arms": ["graft"],
                "few_labels": ["10pct", "1pct"],
                "propagated": ["1pct"],
                "semi_supervised": ["10pct"],
            },
        )
    )
    frozen = ["linear", "fewshot-10pct", "fewshot-1pct", "propagate-1pct", "selected-1pct", "selected-1pct-propagated"]
    assert {arm: params.tasks_of(arm) for arm in params.arms} == {
        "pixels": frozen,
        "random": frozen,
        "mim": frozen,
        "cl": frozen,
        "graft": [*frozen, "finetune-10pct", "semi-10pct"],
    }


def test_a_recipe_that_is_not_there_is_named_with_those_there_are(params: Params) -> None:
    assert params.recipe("10pct") is params.finetune["10pct"]
    with pytest.raises(LgpError, match=r"no recipe finetune\.1pct, only 10pct: add it"):
        params.recipe("1pct")


def test_a_stage_sees_the_sections_it_lists_and_no_others(params: Params) -> None:
    visible = restricted(params, ("seed", "data.source", "mim"))
    assert (visible.seed, visible.data.source, visible.mim, visible.run) == (
        params.seed,
        params.data.source,
        params.mim,
        params.run,
    )
    for key in set(type(params.data).model_fields) - {"source"}:
        with pytest.raises(AttributeError):
            getattr(visible.data, key)
    assert params.data.channels  # the whole file stays whole
    for section in Params.model_fields.keys() - {"seed", "data", "mim", "run"}:
        with pytest.raises(AttributeError, match=section):
            getattr(visible, section)


def test_a_stage_sees_the_recipes_it_lists_and_no_others(values: dict[str, Any]) -> None:
    recipe = values["finetune"]["10pct"]
    params = Params.model_validate(merged(values, {"finetune": {"1pct": {**recipe, "epochs": 7}}}))
    seen = restricted(params, ("seed", "finetune.1pct"))
    assert seen.recipe("1pct").epochs == 7
    with pytest.raises(LgpError, match=r"no recipe finetune\.10pct"):
        seen.recipe("10pct")


def test_values_of_sections_are_those_that_dvc_watches(params: Params) -> None:
    values = section_values(params, ("seed", "data.source", "finetune.10pct", "finetune.all"))
    assert values.keys() == {"seed", "data", "finetune"}
    assert values["data"] == {"source": ["digits"]}
    assert values["finetune"].keys() == {"10pct"}
    assert values["finetune"]["10pct"]["epochs"] == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"masked": "one_sided"}, "masked one_sided has no effect with mask_ratio 0"),
        (
            {"masked": "queries_and_keys", "mask_ratio": 0.5, "objective": "simclr"},
            "masked queries_and_keys is of mocov3",
        ),
    ],
)
def test_masks_that_no_objective_reads_are_refused(values: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Params.model_validate(merged(values, {"contrastive": changes}))
