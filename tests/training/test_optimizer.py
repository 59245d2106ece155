"""Parameter groups and the schedule."""

import math

import pytest
import torch
from torch import nn

from lgp.models.contrastive import build_contrastive
from lgp.models.vit import build_encoder
from lgp.params.file import Params
from lgp.training.optimizer import adamw, parameter_groups, peak_rate, warmup_cosine, whole_warmup_steps


def test_rate_scales_with_the_batch() -> None:
    assert peak_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_every_trainable_parameter_is_in_exactly_one_group(params: Params) -> None:
    moco = build_contrastive(build_encoder(params.model, params.data), params.contrastive)
    rates = {name: (0.1 if "blocks.0" in name else 0.2) for name, _ in moco.named_parameters()}
    groups = parameter_groups(moco, rates, 0.05)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in moco.parameters() if p.requires_grad)
    names = {id(p): n for n, p in moco.named_parameters()}
    for group in groups:
        for p in group["params"]:
            assert group["lr"] == rates[names[id(p)]]
            assert group["weight_decay"] == (0.0 if p.ndim == 1 else 0.05)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (50, 0)])
def test_schedule_equals_the_formula(steps: int, warmup: int) -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [w], "lr": lr, "weight_decay": 0.0} for w, lr in zip(weights, (0.4, 0.1), strict=True)]
    optimizer = adamw(groups, (0.9, 0.95))
    schedule = warmup_cosine(optimizer, steps, warmup)
    for step in range(steps):
        schedule.step_update(step)
        for group, peak in zip(optimizer.param_groups, (0.4, 0.1), strict=True):
            if step < warmup:
                expected = peak * step / warmup
            else:
                expected = peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
            assert group["lr"] == pytest.approx(expected), step


def test_schedule_needs_no_state() -> None:
    optimizer = adamw([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}], (0.9, 0.95))
    warmup_cosine(optimizer, 100, 10).step_update(37)
    halfway = optimizer.param_groups[0]["lr"]
    again = adamw([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}], (0.9, 0.95))
    schedule = warmup_cosine(again, 100, 10)
    for step in range(38):
        schedule.step_update(step)
    assert again.param_groups[0]["lr"] == halfway


@pytest.mark.parametrize(("epochs", "of_an_epoch", "expected"), [(0, 20, 0), (2.5, 3, 8), (1.4, 3, 4), (10, 5, 24)])
def test_warm_up_is_of_whole_steps_and_leaves_one_after_it(epochs: float, of_an_epoch: int, expected: int) -> None:
    assert whole_warmup_steps(epochs, of_an_epoch, 25) == expected


def test_optimizer_has_the_betas_and_is_fused() -> None:
    optimizer = adamw([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}], (0.8, 0.95))
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert optimizer.defaults["fused"]
