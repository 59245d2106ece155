"""Whether a run that did not train is noticed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Silent
from torch import nn
from torch.optim import AdamW

from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.params.file import Params
from lgp.pretrain.arm import Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.sanity_checks import group_of, movement, spread, weights_of
from lgp.training.resume_states import StateStore


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("encoder.cls_token", "embed"),
        ("encoder.patch_embed.proj.weight", "embed"),
        ("encoder.blocks.11.attn.qkv.weight", "block11"),
        ("contrastive.encoder.blocks.3.norm1.bias", "block3"),
        ("encoder.norm.weight", "norm"),
        ("projector.0.weight", "heads"),
        ("decoder_blocks.0.attn.qkv.weight", "heads"),
        ("momentum_encoder.blocks.0.norm1.bias", "momentum_encoder"),
        ("contrastive.momentum_projector.0.weight", "momentum_projector"),
    ],
)
def test_every_parameter_has_a_group(name: str, group: str) -> None:
    assert group_of(name) == group


class Parts(nn.Module):
    """A model with the names of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"norm": nn.Linear(4, 4)})
        self.projector = nn.Linear(4, 4)
        self.momentum_encoder = nn.ModuleDict({"norm": nn.Linear(4, 4)}).requires_grad_(False)


def moved_by(
    distances: dict[str, float], model: Parts, reached: tuple[str, ...] = ("norm", "heads")
) -> dict[str, float]:
    """Move each group by a distance, with an optimizer that saw the gradients of the groups `reached`."""
    initial, optimizer = weights_of(model), AdamW(model.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(distances[group_of(name)])
            optimizer.state[parameter]["exp_avg_sq"] = torch.full((4,), float(group_of(name) in reached))
    return movement(model, initial, {name: 0.01 for name, _ in model.named_parameters()}, 100, optimizer)


ALL = {"norm": 0.5, "heads": 0.25, "momentum_encoder": 0.1}


def test_movement_is_the_share_of_the_summed_rates() -> None:
    moved = moved_by(ALL, Parts())
    assert moved == pytest.approx({"moved/norm": 1.0, "moved/heads": 0.5, "moved/momentum_encoder": 0.1}, rel=1e-3)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("norm", "norm moved by 0 of its learning rates, expected at least 0.002"),
        ("heads", "heads moved by 0 of its learning rates"),
        ("momentum_encoder", "momentum_encoder did not move"),
    ],
)
def test_group_that_stays_behind_fails_the_run(group: str, message: str) -> None:
    with pytest.raises(LgpError, match=f"did not train: {message}"):
        moved_by(ALL | {group: 0.0}, Parts())


def test_group_that_weight_decay_alone_moved_fails_the_run() -> None:
    with pytest.raises(LgpError, match="did not train: no gradient reached heads"):
        moved_by(ALL, Parts(), reached=("norm",))


def test_frozen_parameter_that_moves_fails_the_run() -> None:
    model = Parts()
    model.projector.weight.requires_grad_(False)
    with pytest.raises(LgpError, match=r"projector\.weight is frozen, but moved"):
        moved_by(ALL, model)


def test_momentum_copy_of_a_frozen_parameter_may_not_drift() -> None:
    model = Parts()
    model.encoder.requires_grad_(False)
    with pytest.raises(LgpError, match=r"momentum_encoder\.norm\.weight is frozen, but moved"):
        moved_by(ALL | {"norm": 0.0}, model)
    moved = moved_by(ALL | {"norm": 0.0, "momentum_encoder": 0.0}, model)
    assert moved == {"moved/norm": 0.0, "moved/heads": 0.5, "moved/momentum_encoder": 0.0}


def test_held_group_needs_to_move_only_at_all() -> None:
    model = Parts()
    initial, optimizer = weights_of(model), AdamW(model.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(1e-6 if name.startswith("encoder.") else 0.1)
            optimizer.state[parameter]["exp_avg_sq"] = torch.ones(4)
    rates = {name: 0.01 for name, _ in model.named_parameters()}
    with pytest.raises(LgpError, match="norm moved by"):
        movement(model, initial, rates, 100, optimizer)
    assert movement(model, initial, rates, 100, optimizer, frozenset({"encoder.norm.weight"}))["moved/norm"] > 0


def test_optimizer_that_never_steps_is_noticed(
    tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the original code did."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    session = Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())
    with pytest.raises(LgpError, match=r"it did not train: .*no gradient reached block0"):
        pretrain_cl(session)


def test_spread_of_known_features() -> None:
    rng = np.random.default_rng(0)
    isotropic = spread(rng.normal(size=(4000, 16)))
    assert isotropic["features/std"] == pytest.approx(1, abs=0.02)
    assert isotropic["features/effective_rank"] == pytest.approx(16, abs=0.1)
    three = spread(rng.normal(size=(4000, 3)) @ np.linalg.qr(rng.normal(size=(16, 3)))[0].T)
    assert three["features/effective_rank"] == pytest.approx(3, abs=0.05)
    singular = np.array([3.0, 1.0])
    orthonormal = np.linalg.qr(rng.normal(size=(50, 3)) - 0)[0]
    centred = orthonormal - orthonormal.mean(axis=0)
    q = np.linalg.qr(centred)[0][:, :2] * singular
    entropy = -sum(p * math.log(p) for p in (0.75, 0.25))
    assert spread(q)["features/effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_collapsed_features_fail_the_run(noise: float) -> None:
    rng: Any = np.random.default_rng(0)
    with pytest.raises(LgpError, match="the features collapsed"):
        spread(np.ones((100, 8)) + noise * rng.normal(size=(100, 8)))


def test_features_on_one_line_fail_the_run() -> None:
    line = np.outer(np.linspace(-1, 1, 100), np.ones(8))
    with pytest.raises(LgpError, match="effective rank 1"):
        spread(line)
