"""SimCLR against a slow reference written from its equation 1."""

import math

import pytest
import torch
from torch import Tensor, nn

from lgp.models.simclr import SimCLR, nt_xent
from lgp.models.vit import View, build_encoder
from lgp.params.file import Params


def slow_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> float:
    """Equation 1, view by view: 2k - 1 and 2k are the two of image k."""
    views = [z for pair in zip(z1, z2, strict=True) for z in pair]

    def similarity(i: int, j: int) -> float:
        return (views[i] @ views[j] / (views[i].norm() * views[j].norm())).item()

    def pair_loss(i: int, j: int) -> float:
        others = sum(math.exp(similarity(i, k) / temperature) for k in range(len(views)) if k != i)
        return -math.log(math.exp(similarity(i, j) / temperature) / others)

    total = sum(pair_loss(2 * k, 2 * k + 1) + pair_loss(2 * k + 1, 2 * k) for k in range(len(z1)))
    return total / len(views)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_loss_equals_the_slow_reference(temperature: float) -> None:
    z1, z2 = torch.randn(6, 5).double() * 3, torch.randn(6, 5).double()
    assert nt_xent(z1, z2, temperature).item() == pytest.approx(slow_nt_xent(z1, z2, temperature), rel=1e-6)


def test_forward_is_symmetric_and_trains_both_views(params: Params) -> None:
    model = SimCLR(build_encoder(params.model, params.data), 32, 16, 0.5).eval().double()
    view1, view2 = View(torch.randn(4, 1, 8, 8).double()), View(torch.randn(4, 1, 8, 8).double())
    assert model(view1, view2, 0.0).item() == pytest.approx(model(view2, view1, 1.0).item(), rel=1e-9)
    model.train()(view1, view2, 0.0).backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {"encoder.pos_embed"}


def test_projector_has_two_layers_and_the_loss_is_of_its_outputs(params: Params) -> None:
    model = SimCLR(build_encoder(params.model, params.data), 32, 12, 0.3)
    linears = [(m.in_features, m.out_features) for m in model.projector if isinstance(m, nn.Linear)]
    assert linears == [(16, 32), (32, 12)]
    model = model.eval().double()
    images = torch.randn(2, 4, 1, 8, 8).double()
    z1, z2 = (model.projector(model.encoder(view)) for view in images)
    expected = slow_nt_xent(z1, z2, 0.3)
    assert model(View(images[0]), View(images[1]), 0.0).item() == pytest.approx(expected, rel=1e-6)
