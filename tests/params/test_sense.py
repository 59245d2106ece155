"""Nonsense that each key allows is refused before any work; what is accepted comes back from its file."""

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, merged
from hypothesis import given, settings
from hypothesis import strategies as st

from lgp.errors import LgpError
from lgp.params.file import Params, check_values, parse_params

FILE = Path("params.yaml")


@functools.cache
def digits() -> dict[str, Any]:
    """The preset digits, with the values of the keys that it leaves out."""
    preset = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text())
    return Params.model_validate(preset).model_dump(mode="json")


def places(values: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all sections and keys."""
    deeper = [
        path for name, value in values.items() if isinstance(value, dict) for path in places(value, (*above, name))
    ]
    return [(*above, name) for name in values] + deeper


EDGES = st.one_of(
    st.sampled_from([0, -1, 1, 2, 0.5, 1e-30, 1e30, math.inf, math.nan, 10**12, 10**30, True, None, "", "x", [], {}]),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(0, 3), st.floats(0, 2), st.sampled_from(["mim", "1pct", True])), max_size=3),
)


def mutated(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    values = merged(digits(), {})
    section = values
    for name in path[:-1]:
        section = section[name]
    section[path[-1]] = value
    return values


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.deferred(lambda: st.sampled_from(places(digits()))), EDGES)
def test_any_change_is_refused_by_name_or_comes_back(path: tuple[str, ...], value: Any) -> None:
    said, params = "", None
    try:
        params = check_values(mutated(path, value), FILE)
    except LgpError as e:
        said = str(e)
    if params is None:
        assert any(name in said for name in path)
        assert "\n" not in said
    else:
        assert check_values(params.model_dump(mode="json"), FILE) == params


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.deferred(lambda: st.sampled_from([path for path in places(digits()) if path[0] == "mim"])), EDGES)
def test_what_is_accepted_comes_back_from_text(path: tuple[str, ...], value: Any) -> None:
    try:
        params = check_values(mutated(path, value), FILE)
    except LgpError:
        return
    assert parse_params(yaml.safe_dump(params.model_dump(mode="json"), allow_unicode=True), FILE) == params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"image_size": 10**12}}, "data.image_size 1000000000000 is above 4096 pixels: lower it"),
        ({"contrastive": {"views": {"blur_p": []}}}, "contrastive.views.blur_p.0"),
        ({"mim": {"decoder_depth": True}}, "mim.decoder_depth: true and false are no numbers: give a number"),
        ({"labels": {"shots": [2, True]}}, "labels.shots.1: true and false are no numbers"),
        ({"contrastive": {"temperature": 1e-30}}, "contrastive.temperature 1e-30 is not from 0.001 to 100: choose"),
        ({"cl": {"base_lr": 1e30}}, "cl.base_lr 1e+30 is not from 1e-12 to 10000"),
        ({"cl": {"clip_norm": 1e-30}}, "cl.clip_norm 1e-30 is not from 0.0001 to 1e+06"),
        ({"mim": {"epochs": 10**12}}, "mim.epochs 1e+12 is not from 1e-06 to 1e+06"),
        ({"linear": {"base_lrs": [1e-3, 1e30]}}, "linear.base_lrs 1e+30 is not from"),
        ({"linear": {"base_lrs": [1, 1.0]}}, "linear.base_lrs names 1.0 twice: each value once"),
        ({"data": {"source": ["digits", "digits"]}}, "data.source names digits twice"),
        ({"graft": {"policy": ["stage_lr", "stage_lr"]}}, "graft.policy names stage_lr twice"),
        ({"model": {"width": 10**12}}, "model.width 1000000000000 and model.depth 3 give a model of more than 1e+11"),
        (
            {"contrastive": {"projector_dim": 10**9}},
            "contrastive.projector_hidden, projector_dim or predictor_hidden, 10",
        ),
        ({"contrastive": {"projector_dim": 1}}, "contrastive.projector_dim 1 has no directions to compare: choose 2"),
        ({"mim": {"decoder_width": 10**8}}, "mim.decoder_width 100000000 and mim.decoder_depth 2 give a model"),
        ({"data": {"store_short_side": 4}}, "data.store_short_side 4 is below data.image_size 8"),
        ({"data": {"eval_crop": 1e-30}}, "data.eval_crop 1e-30 is not from 0.1 to 1"),
        (
            {"mim": {"crop_scale_min": 0.01}},
            "mim.crop_scale_min 0.01 leaves less than one pixel of an image of 8×8",
        ),
        ({"contrastive": {"views": {"crop_scale_min": 1e-30}}}, "contrastive.views.crop_scale_min 1e-30 leaves less"),
        ({"linear": {"crop_scale_min": 1e-30}}, "linear.crop_scale_min 1e-30 leaves less"),
        ({"finetune": {"10pct": {"crop_scale_min": 1e-30}}}, "finetune.10pct.crop_scale_min 1e-30 leaves less"),
        ({"mim": {"mask_ratio": 1e-30}}, "mim.mask_ratio 1e-30 hides none of the 16 patches: raise it to 0.06"),
        ({"contrastive": {"mask_ratio": 1e-30}}, "contrastive.mask_ratio 1e-30 hides none of the 16 patches"),
        ({"graft": {"stage_lr": {"base_lrs": [0, 0, 0]}}}, "graft.stage_lr.base_lrs are all 0, so nothing is trained"),
        ({"reverse": {"base_lrs": [0]}}, "reverse.base_lrs are all 0, so nothing is trained"),
        ({"finetune": {"10pct": {"layer_decay": 1e-5}}}, "finetune.10pct.layer_decay 1e-05 leaves the lowest of 3 blo"),
        (
            {"graft": {"policy": "layer_decay", "layer_decay": {"decay": 1e-5}}},
            "graft.layer_decay.decay 1e-05 leaves the lowest of 3 blocks no rate",
        ),
        (
            {"contrastive": {"objective": "vicreg", "vicreg": {"invariance": 0, "variance": 0, "covariance": 0}}},
            "contrastive.vicreg has the weight 0 for all terms",
        ),
        (
            {"contrastive": {"small_views": {"count": 2, "size": 8}}},
            "contrastive.small_views.size 8 must be a multiple",
        ),
        ({"contrastive": {"small_views": {"count": 2, "size": 3}}}, "below data.image_size 8: choose one of [2, 4, 6]"),
        (
            {"contrastive": {"small_views": {"count": 2, "size": 4, "crop_scale_min": 1e-3}}},
            "contrastive.small_views.crop_scale_min 0.001 leaves less than one pixel",
        ),
        (
            {"contrastive": {"small_views": {"count": 2, "size": 4, "crop_scale_min": 0.3}}},
            "crop_scale_min 0.3 is above crop_scale_max 0.25",
        ),
        (
            {"contrastive": {"objective": "refine", "refine": {"heads": 4}}},
            "contrastive.refine.heads 4 is more than the 3 blocks",
        ),
        ({"contrastive": {"refine": {"queue": 10**12}}}, "contrastive.refine.queue 1000000000000 give"),
        ({"contrastive": {"swav": {"prototypes": 10**12}}}, "contrastive.swav.prototypes 1000000000000 give"),
        ({"mim": {"weight_decay": 1e3}}, "mim.weight_decay 1000 times the peak rate 0.002 is 1 or more"),
        ({"graft": {"weight_decay": 1e3}}, "graft.weight_decay 1000 times the peak rate 0.002 is 1 or more"),
        ({"reverse": {"weight_decay": 1e3}}, "reverse.weight_decay 1000 times the peak rate 0.002 is 1 or more"),
        ({"finetune": {"10pct": {"weight_decay": 1e5}}}, "finetune.10pct.weight_decay 100000 times the peak rate"),
        ({"run": {"workers": 10**12}}, "run.workers 1e+12 is not from 1 to 1024"),
        ({"run": {"experiment": " "}}, "run.experiment is empty"),
    ],
)
def test_nonsense_is_named_with_what_is_valid(values: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(LgpError) as error:
        check_values(merged(values, change), FILE)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"mim": {"crop_scale_min": 0.0625}},
        {"graft": {"stage_lr": {"base_lrs": [0, 0, 1e-3]}}},
        {"linear": {"weight_decays": [0]}},
        {"mim": {"mask_ratio": 0.0626}},
        {"contrastive": {"vicreg": {"invariance": 0, "variance": 0, "covariance": 0}}},
        {"contrastive": {"small_views": {"count": 2, "size": 6, "crop_scale_min": 0.25}}},
        {"run": {"workers": 0}},
        {"labels": {"whole_groups": True}},
        {"data": {"store_short_side": 8}},
    ],
)
def test_the_edge_of_sense_is_accepted(values: dict[str, Any], change: dict[str, Any]) -> None:
    check_values(merged(values, change), FILE)
