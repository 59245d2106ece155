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
from lgp.models.roles import PretrainingModel
from lgp.params.file import Params
from lgp.pretrain import sanity_checks
from lgp.pretrain.arm import Checks, Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.mim import pretrain_mim
from lgp.pretrain.sanity_checks import Findings, check_features, check_loss, check_weights, weights_of
from lgp.training.loop import Trainer
from lgp.training.resume_states import StateStore


class Encoder(nn.Module):
    """As far as roles look at it, an encoder without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc_norm, self.blocks = nn.Linear(4, 4), nn.Identity(), nn.ModuleList()


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
    distances: dict[str, float], model: Parts, reached: tuple[str, ...] = ("norm", "heads"), steps: int = 100
) -> Findings:
    """Check parts that moved by a distance, with an optimizer that saw the gradients of the parts `reached`."""
    initial, optimizer, roles = weights_of(model), AdamW(model.parameters()), model.roles()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(distances[roles[name].part])
            optimizer.state[parameter]["exp_avg_sq"] = torch.full((4,), float(roles[name].part in reached))
    return check_weights(model, initial, {name: 0.01 for name, _ in model.named_parameters()}, steps, optimizer)


ALL = {"norm": 0.5, "heads": 0.25, "momentum_encoder": 0.1}


def test_movement_is_the_share_of_the_summed_rates() -> None:
    moved = moved_by(ALL, Parts())
    metrics = {"moved/norm": 1.0, "moved/heads": 0.5, "moved/momentum_encoder": 0.1}
    assert moved.metrics == pytest.approx(metrics, rel=1e-3)
    assert not moved.faults


@pytest.mark.parametrize(
    ("part", "fault", "remedy"),
    [
        ("norm", "norm moved by 0 of its learning rates, expected at least 0.002", sanity_checks.HOLD_LESS),
        ("heads", "heads moved by 0 of its learning rates, expected at least 0.002", sanity_checks.HOLD_LESS),
        ("momentum_encoder", "momentum_encoder did not move", sanity_checks.GO_FURTHER),
    ],
)
def test_part_that_stays_behind_is_a_fault(part: str, fault: str, remedy: str) -> None:
    assert moved_by(ALL | {part: 0.0}, Parts()).faults == {fault: remedy}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_momentum_copy_may_stand_still_for_two_steps(steps: int) -> None:
    """The first step has a rate of 0 where there is a warm-up, and the copy follows a step later."""
    still = moved_by(ALL | {"momentum_encoder": 0.0}, Parts(), steps=steps).faults
    assert still == ({"momentum_encoder did not move": sanity_checks.GO_FURTHER} if steps > 2 else {})


def test_part_that_weight_decay_alone_moved_is_a_fault() -> None:
    assert moved_by(ALL, Parts(), reached=("norm",)).faults == {"no gradient reached heads": sanity_checks.REPORT}


def test_frozen_parameter_that_moves_is_a_fault() -> None:
    model = Parts()
    model.projector[0].weight.requires_grad_(False)
    assert moved_by(ALL, model).faults == {"projector.0.weight is frozen, but moved": sanity_checks.REPORT}


def test_momentum_copy_of_a_frozen_parameter_may_not_drift() -> None:
    model = Parts()
    model.encoder.requires_grad_(False)
    assert "momentum_encoder.norm.weight is frozen, but moved" in moved_by(ALL | {"norm": 0.0}, model).faults
    moved = moved_by(ALL | {"norm": 0.0, "momentum_encoder": 0.0}, model)
    assert not moved.faults
    assert moved.metrics == {"moved/norm": 0.0, "moved/heads": 0.5, "moved/momentum_encoder": 0.0}


def test_regularized_part_needs_to_move_only_at_all() -> None:
    model = Parts()
    initial, optimizer = weights_of(model), AdamW(model.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(1e-6 if name.startswith("encoder.") else 0.1)
            optimizer.state[parameter]["exp_avg_sq"] = torch.ones(4)
    rates = {name: 0.01 for name, _ in model.named_parameters()}
    (fault,) = check_weights(model, initial, rates, 100, optimizer).faults
    assert fault.startswith("norm moved by")
    regularized = frozenset({"encoder.norm.weight"})
    checked = check_weights(model, initial, rates, 100, optimizer, regularized)
    assert not checked.faults
    assert checked.metrics["moved/norm"] == pytest.approx(
        1e-6 / (0.01 * 100 / 2), rel=0.1
    )  # as far as single precision tells
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            parameter.copy_(initial[f"encoder.{name}"])
    assert "norm did not move" in check_weights(model, initial, rates, 100, optimizer, regularized).faults


def test_optimizer_that_never_steps_is_noticed(
    tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the original code did."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    session = Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())
    assert "no gradient reached block0" in pretrain_cl(session).checks.faults


def test_features_of_known_spread() -> None:
    rng = np.random.default_rng(0)
    isotropic = check_features(rng.normal(size=(4000, 16)))
    assert isotropic.metrics["features/std"] == pytest.approx(1, abs=0.02)
    assert isotropic.metrics["features/effective_rank"] == pytest.approx(16, abs=0.1)
    three = check_features(rng.normal(size=(4000, 3)) @ np.linalg.qr(rng.normal(size=(16, 3)))[0].T)
    assert three.metrics["features/effective_rank"] == pytest.approx(3, abs=0.05)
    singular = np.array([3.0, 1.0])
    orthonormal = np.linalg.qr(rng.normal(size=(50, 3)) - 0)[0]
    centred = orthonormal - orthonormal.mean(axis=0)
    q = np.linalg.qr(centred)[0][:, :2] * singular
    entropy = -sum(p * math.log(p) for p in (0.75, 0.25))
    assert check_features(q).metrics["features/effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-3)


def spread(deviation: float, dimensions: int = 8) -> np.ndarray:
    """Features that deviate a little from one point, in every direction."""
    noise: np.ndarray = np.random.default_rng(0).normal(size=(400, dimensions))
    return np.ones((400, dimensions)) + deviation * noise


@pytest.mark.parametrize("deviation", [0.0, 1e-7, 5e-5])
def test_constant_features_are_a_fault_that_names_the_deviation(deviation: float) -> None:
    (fault,) = check_features(spread(deviation)).faults
    assert "deviation on the unit sphere" in fault
    assert ("effective rank" in fault) == (not deviation)  # rounding errors lie in all directions
    assert fault.count("alarm below") == (1 if deviation else 2)
    assert deviation or "(alarm below 1.5), deviation on" in fault


def test_features_on_one_line_are_a_fault_that_names_the_rank_alone() -> None:
    checked = check_features(np.outer(np.linspace(-1, 1, 100), np.ones(8)))
    assert list(checked.faults) == ["the features collapsed: effective rank 1 (alarm below 1.5)"]


def test_short_training_is_a_warning_and_no_fault() -> None:
    checked = check_features(spread(5e-3))
    assert not checked.faults
    (warning,) = checked.warnings
    assert warning.startswith(
        "too few epochs, or a learning rate that is too low or too high: the features deviate by 0.004"
    )
    assert not check_features(spread(0.05)).warnings


def test_features_that_are_not_finite_are_a_fault() -> None:
    features = spread(1.0)
    features[3, 2] = np.nan
    found = check_features(features)
    assert found.faults == {"a feature is not finite": sanity_checks.CALM_DOWN}
    assert found.metrics == {"features/std": 0.0, "features/effective_rank": 0.0}


def test_deviation_is_that_of_each_dimension_about_its_own_mean() -> None:
    features = spread(0.01) + np.arange(8)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = float(np.mean([math.sqrt(np.mean((u - u.mean()) ** 2)) for u in unit.T])) * math.sqrt(8)
    assert check_features(features).metrics["features/std"] == pytest.approx(expected, rel=1e-3)


def test_features_are_put_on_the_sphere_whatever_their_length() -> None:
    short, long = (check_features(length * spread(1.0)).metrics for length in (1e-3, 1e3))
    assert short == long
    assert short["features/std"] > 0.1


@pytest.mark.parametrize(
    ("epochs", "fault", "warning"),
    [
        ([3.1, 2.0], "", ""),
        ([3.1, 6.01], "the loss rose from 3 at the first step to 6.01", ""),
        ([3e6, 2.9], "", ""),  # it rose, and came back
        (
            [3e6, 4.1],
            "",
            f"{sanity_checks.SHORT}: the loss did not fall: 3 at the beginning, 4.1 on average over the last epoch",
        ),
        (
            [3.1, 3.07],
            "",
            f"{sanity_checks.SHORT}: the loss did not fall: 3 at the beginning, 3.07 on average over the last epoch",
        ),
        ([3.1, (1 - sanity_checks.LOW_FALL) * 3.0], "", ""),
        (
            [2.5, 2.48],
            "",
            f"{sanity_checks.SHORT}: the loss hardly fell: 2.5 at the beginning, 2.48 on average over the last epoch",
        ),
        (
            [3.1, 6.0],
            "",
            f"{sanity_checks.SHORT}: the loss did not fall: 3 at the beginning, 6 on average over the last epoch",
        ),
        (
            [2.5, 2.6],  # below the first step, above the first epoch
            "",
            f"{sanity_checks.SHORT}: the loss did not fall: 2.5 at the beginning, 2.6 on average over the last epoch",
        ),
        ([5.9], "", ""),  # one epoch has nothing to fall from
        ([6.1], "the loss rose from 3 at the first step to 6.1", ""),
    ],
)
def test_loss_that_rose_is_a_fault_and_one_that_hardly_fell_a_warning(
    epochs: list[float], fault: str, warning: str
) -> None:
    found = check_loss(3.0, epochs)
    assert list(found.faults) == ([fault] if fault else [])
    assert list(found.faults.values()) == [sanity_checks.SLOW_DOWN] * bool(fault)
    assert [w.startswith(warning) for w in found.warnings] == [True] * bool(warning)


@pytest.mark.parametrize("arm", ["mim", "cl"])
def test_training_that_diverges_without_nan_is_a_fault(
    arm: str, tmp_path: Path, params: Params, prepared: LabelledImages
) -> None:
    """InfoNCE is bounded, so the objective is one that is not."""
    fast = getattr(params, arm).model_copy(update={"epochs": 10, "warmup_epochs": 1, "base_lr": 4.0})
    contrastive = params.contrastive.model_copy(update={"objective": "vicreg"})
    changed = params.model_copy(update={arm: fast, "contrastive": contrastive})
    found = {"mim": pretrain_mim, "cl": pretrain_cl}[arm](started(changed, prepared, tmp_path))
    assert any(fault.startswith("the loss rose from ") for fault in found.checks.faults)
    assert found.progression.ended_early


def test_rate_that_teaches_nothing_is_warned_of(tmp_path: Path, params: Params, prepared: LabelledImages) -> None:
    slow = params.mim.model_copy(update={"epochs": 4, "base_lr": 1e-12})
    found = pretrain_mim(started(params.model_copy(update={"mim": slow}), prepared, tmp_path))
    assert any("the loss hardly fell" in w or "the loss did not fall" in w for w in found.checks.warnings)


def test_findings_of_two_checks_are_joined() -> None:
    both = Findings({"a": 1.0}, {"x": "do"}, ("w",)) | Findings({"b": 2.0}, {"y": "do"}, ("v",))
    assert both == Findings({"a": 1.0, "b": 2.0}, {"x": "do", "y": "do"}, ("w", "v"))


def long_mim(params: Params, epochs: int, warmup_epochs: int = 1) -> Params:
    mim = params.mim.model_copy(update={"epochs": epochs, "warmup_epochs": warmup_epochs})
    return params.model_copy(update={"mim": mim})


def started(params: Params, prepared: LabelledImages, folder: Path) -> Session:
    return Session(prepared, params, StateStore(folder, "code"), Silent())


def test_dead_training_ends_at_the_first_check_after_its_warm_up(
    tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain_mim(started(long_mim(params, 20), prepared, tmp_path / "whole")).progression
    monkeypatch.setattr(sanity_checks, "MIN_EFFECTIVE_RANK", 1e3)
    dead = pretrain_mim(started(long_mim(params, 20, warmup_epochs=4), prepared, tmp_path / "dead"))
    assert len(dead.progression.history) == 6  # every tenth of 20 epochs, and none within the 4 of warm-up
    assert dead.progression.train_flops == whole.train_flops * 6 // 20
    (fault,) = dead.checks.faults
    assert fault.endswith("(alarm below 1000.0), after 6 of 20 epochs")


@pytest.mark.parametrize(("epochs", "ended"), [(500, 10), (9, 9)])
def test_checks_are_at_most_ten_epochs_apart_and_at_the_end_of_a_few(
    epochs: int, ended: int, tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanity_checks, "MIN_EFFECTIVE_RANK", 1e3)
    dead = pretrain_mim(started(long_mim(params, epochs), prepared, tmp_path))
    assert len(dead.progression.history) == ended
    assert dead.checks.faults


def test_accepted_arm_is_not_ended_early(
    tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanity_checks, "MIN_EFFECTIVE_RANK", 1e3)
    long = long_mim(params, 20)
    accepted = long.model_copy(update={"run": long.run.model_copy(update={"accept": ["mim"]})})
    whole = pretrain_mim(started(accepted, prepared, tmp_path))
    assert len(whole.progression.history) == 20
    assert whole.checks.faults


def test_training_that_ended_early_is_checked_again_and_not_continued(
    tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanity_checks, "MIN_EFFECTIVE_RANK", 1e3)
    first, second = (pretrain_mim(started(long_mim(params, 20), prepared, tmp_path)) for _ in range(2))
    assert second.progression == first.progression
    assert second.checks == first.checks
    monkeypatch.undo()  # as where another device finds other measures
    assert list(pretrain_mim(started(long_mim(params, 20), prepared, tmp_path)).checks.faults) == [
        "a check failed, after 2 of 20 epochs"
    ]


@pytest.mark.parametrize("arm", ["mim", "cl"])
def test_checks_do_not_change_a_training(
    arm: str, tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its weights, not the running statistics of BatchNorm, not the random numbers, not the mode."""
    pretrain = {"mim": pretrain_mim, "cl": pretrain_cl}[arm]
    longer = params.model_copy(update={arm: getattr(params, arm).model_copy(update={"epochs": 10})})
    checked: list[int] = []
    results, modes, step = [], set[bool](), Trainer._step
    find_dead = Checks.find_dead

    def noted(self: Trainer, *rest: Any) -> None:
        modes.update(module.training for module in self.model.modules())
        step(self, *rest)

    monkeypatch.setattr(Trainer, "_step", noted)
    for name, watch in (
        ("with", lambda s, now: bool(checked.append(len(now.history))) or find_dead(s, now)),
        ("without", lambda *_: False),
    ):
        monkeypatch.setattr(Checks, "find_dead", watch)
        torch.manual_seed(0)
        result = pretrain(started(longer, prepared, tmp_path / name))
        results.append([*(t.numpy().tobytes() for t in result.model.state_dict().values()), torch.rand(1).item()])
    assert checked == list(range(1, 10))
    assert results[0] == results[1]
    assert modes == {True}
