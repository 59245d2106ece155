"""VICReg against a slow reference written from its equations 1 to 6."""

import math

import pytest
import torch
from torch import Tensor, nn

from lgp.models.vicreg import VICReg, covariance_term, variance_term, vicreg_loss
from lgp.models.vit import View, build_encoder
from lgp.params.file import Params
from lgp.params.pretrain import VicregWeights


def slow_terms(z: Tensor) -> tuple[float, float]:
    """Variance and covariance term of (N, D), number by number."""
    n, d = z.shape
    rows = z.tolist()
    means = [sum(row[j] for row in rows) / n for j in range(d)]

    def covariance(i: int, j: int) -> float:
        return sum((row[i] - means[i]) * (row[j] - means[j]) for row in rows) / (n - 1)

    variance = sum(max(0.0, 1 - math.sqrt(covariance(j, j) + 1e-4)) for j in range(d)) / d
    return variance, sum(covariance(i, j) ** 2 for i in range(d) for j in range(d) if i != j) / d


def test_loss_equals_the_slow_reference() -> None:
    z1, z2 = torch.randn(7, 5).double() * 0.8, torch.randn(7, 5).double() * 1.1
    (v1, c1), (v2, c2) = slow_terms(z1), slow_terms(z2)
    assert variance_term(z1).item() == pytest.approx(v1, rel=1e-6)
    assert covariance_term(z1).item() == pytest.approx(c1, rel=1e-6)
    invariance = sum((a - b) ** 2 for a, b in zip(z1.flatten().tolist(), z2.flatten().tolist(), strict=True)) / 35
    expected = 25 * invariance + 25 * (v1 + v2) + 1 * (c1 + c2)
    assert vicreg_loss(z1, z2, VicregWeights()).item() == pytest.approx(expected, rel=1e-6)


def test_variance_term_pushes_a_collapsed_dimension_apart() -> None:
    z = torch.randn(50, 3) * torch.tensor([2.0, 2.0, 0.0])
    assert variance_term(z).item() == pytest.approx((1 - 0.01) / 3, abs=1e-3)


def test_expander_ends_without_norm(params: Params) -> None:
    model = VICReg(build_encoder(params.model, params.data), 32, 64, VicregWeights())
    assert isinstance(model.projector[-1], nn.Linear)
    assert model.projector[-1].out_features == 64


def test_expander_has_three_layers_and_the_loss_is_of_its_outputs(params: Params) -> None:
    weights = VicregWeights(invariance=3.0, variance=5.0, covariance=7.0)
    model = VICReg(build_encoder(params.model, params.data), 32, 12, weights).eval().double()
    linears = [(m.in_features, m.out_features) for m in model.projector if isinstance(m, nn.Linear)]
    assert linears == [(16, 32), (32, 32), (32, 12)]
    images = torch.randn(2, 6, 1, 8, 8).double()
    z1, z2 = (model.projector(model.encoder(view)) for view in images)
    (v1, c1), (v2, c2) = slow_terms(z1), slow_terms(z2)
    expected = 3 * (z1 - z2).square().mean().item() + 5 * (v1 + v2) + 7 * (c1 + c2)
    assert model(View(images[0]), View(images[1]), 0.0).item() == pytest.approx(expected, rel=1e-6)
