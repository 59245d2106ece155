"""Whether a run that did not train is noticed."""

import copy
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
from lgp.models.roles import PretrainingModel
from lgp.params.file import Params
from lgp.pretrain.arm import Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.sanity_checks import check_features, check_weights, weights_of
from lgp.training.resume_states import StateStore


class Encoder(nn.Module):
    """As far as roles look at it, an encoder without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.blocks = nn.Linear(4, 4), nn.ModuleList()


class Parts(PretrainingModel):
    """A small model with a head and a momentum copy."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: Any = Encoder()
        self.projector = nn.Sequential(nn.Linear(4, 4))
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    def momentum_copies(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.momentum_encoder, self.encoder)]


def moved_by(
    distances: dict[str, float], model: Parts, reached: tuple[str, ...] = ("norm", "heads")
) -> dict[str, float]:
    """Move each part by a distance, with an optimizer that saw the gradients of the parts `reached`."""
    initial, optimizer, roles = weights_of(model), AdamW(model.parameters()), model.roles()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(distances[roles[name].part])
            optimizer.state[parameter]["exp_avg_sq"] = torch.full((4,), float(roles[name].part in reached))
    return check_weights(model, initial, {name: 0.01 for name, _ in model.named_parameters()}, 100, optimizer)


ALL = {"norm": 0.5, "heads": 0.25, "momentum_encoder": 0.1}


def test_movement_is_the_share_of_the_summed_rates() -> None:
    moved = moved_by(ALL, Parts())
    assert moved == pytest.approx({"moved/norm": 1.0, "moved/heads": 0.5, "moved/momentum_encoder": 0.1}, rel=1e-3)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("norm", "norm moved by 0 of its learning rates, expected at least 0.002"),
        ("heads", "heads moved by 0 of its learning rates"),
        ("momentum_encoder", "momentum_encoder did not move"),
    ],
)
def test_part_that_stays_behind_fails_the_run(part: str, message: str) -> None:
    with pytest.raises(LgpError, match=f"did not train: {message}"):
        moved_by(ALL | {part: 0.0}, Parts())


def test_part_that_weight_decay_alone_moved_fails_the_run() -> None:
    with pytest.raises(LgpError, match="did not train: no gradient reached heads"):
        moved_by(ALL, Parts(), reached=("norm",))


def test_frozen_parameter_that_moves_fails_the_run() -> None:
    model = Parts()
    model.projector[0].weight.requires_grad_(False)
    with pytest.raises(LgpError, match=r"projector\.0\.weight is frozen, but moved"):
        moved_by(ALL, model)


def test_momentum_copy_of_a_frozen_parameter_may_not_drift() -> None:
    model = Parts()
    model.encoder.requires_grad_(False)
    with pytest.raises(LgpError, match=r"momentum_encoder\.norm\.weight is frozen, but moved"):
        moved_by(ALL | {"norm": 0.0}, model)
    moved = moved_by(ALL | {"norm": 0.0, "momentum_encoder": 0.0}, model)
    assert moved == {"moved/norm": 0.0, "moved/heads": 0.5, "moved/momentum_encoder": 0.0}


def test_regularized_part_needs_to_move_only_at_all() -> None:
    model = Parts()
    initial, optimizer = weights_of(model), AdamW(model.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(1e-6 if name.startswith("encoder.") else 0.1)
            optimizer.state[parameter]["exp_avg_sq"] = torch.ones(4)
    rates = {name: 0.01 for name, _ in model.named_parameters()}
    with pytest.raises(LgpError, match="norm moved by"):
        check_weights(model, initial, rates, 100, optimizer)
    regularized = frozenset({"encoder.norm.weight"})
    moved = check_weights(model, initial, rates, 100, optimizer, regularized)["moved/norm"]
    assert moved == pytest.approx(1e-6 / (0.01 * 100 / 2), rel=0.1)  # as far as single precision tells
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            parameter.copy_(initial[f"encoder.{name}"])
    with pytest.raises(LgpError, match="norm did not move"):
        check_weights(model, initial, rates, 100, optimizer, regularized)


def test_optimizer_that_never_steps_is_noticed(
    tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the original code did."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    session = Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())
    with pytest.raises(LgpError, match=r"the model did not train: .*no gradient reached block0"):
        pretrain_cl(session)


def test_features_of_known_spread() -> None:
    rng = np.random.default_rng(0)
    isotropic = check_features(rng.normal(size=(4000, 16)))
    assert isotropic["features/std"] == pytest.approx(1, abs=0.02)
    assert isotropic["features/effective_rank"] == pytest.approx(16, abs=0.1)
    three = check_features(rng.normal(size=(4000, 3)) @ np.linalg.qr(rng.normal(size=(16, 3)))[0].T)
    assert three["features/effective_rank"] == pytest.approx(3, abs=0.05)
    singular = np.array([3.0, 1.0])
    orthonormal = np.linalg.qr(rng.normal(size=(50, 3)) - 0)[0]
    centred = orthonormal - orthonormal.mean(axis=0)
    q = np.linalg.qr(centred)[0][:, :2] * singular
    entropy = -sum(p * math.log(p) for p in (0.75, 0.25))
    assert check_features(q)["features/effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-3)


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_collapsed_features_fail_the_run(noise: float) -> None:
    rng: Any = np.random.default_rng(0)
    with pytest.raises(LgpError, match="the features collapsed"):
        check_features(np.ones((100, 8)) + noise * rng.normal(size=(100, 8)))


def test_features_on_one_line_fail_the_run() -> None:
    line = np.outer(np.linspace(-1, 1, 100), np.ones(8))
    with pytest.raises(LgpError, match="effective rank 1"):
        check_features(line)
