"""SwAV against a slow reference written from the paper's equations and its Sinkhorn listing (appendix A.1)."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgp.compute.distributed import SyncBatchNorm1d
from lgp.models.swav import SwAV, sinkhorn, swapped_loss
from lgp.models.vit import View, build_encoder, features_of_view
from lgp.params.file import Params
from lgp.params.pretrain import SwavParams

PARAMS = SwavParams(prototypes=7, epsilon=0.1, iterations=3, frozen=0.25)


def slow_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """The listing of the appendix, entry by entry. Prototypes are rows, images are columns."""
    images, prototypes = scores.shape
    q = [[math.exp(scores[i, k].item() / epsilon) for i in range(images)] for k in range(prototypes)]
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        q = [[value / sum(row) / prototypes for value in row] for row in q]
        columns = [sum(row[i] for row in q) for i in range(images)]
        q = [[row[i] / columns[i] / images for i in range(images)] for row in q]
    return [[q[k][i] * images for k in range(prototypes)] for i in range(images)]


def slow_loss(z: list[Tensor], prototypes: Tensor, temperature: float) -> float:
    """Equation 2 for all pairs of a large view, whose assignment is the target, and another view."""
    prototypes = prototypes / prototypes.norm(dim=1, keepdim=True)
    scores = [(of_view / of_view.norm(dim=1, keepdim=True)) @ prototypes.T for of_view in z]
    terms = []
    for target in (0, 1):
        q = slow_sinkhorn(scores[target], PARAMS.epsilon, PARAMS.iterations)
        for other in range(len(z)):
            if other == target:
                continue
            for i, row in enumerate(scores[other]):
                whole = sum(math.exp(s.item() / temperature) for s in row)
                terms.append(
                    -sum(q[i][k] * math.log(math.exp(s.item() / temperature) / whole) for k, s in enumerate(row))
                )
    return sum(terms) / len(terms)


def test_assignments_equal_the_slow_ones_and_use_all_prototypes_equally() -> None:
    scores = F.normalize(torch.randn(9, 4).double(), dim=1) @ F.normalize(torch.randn(4, 5).double(), dim=0)
    expected = torch.tensor(slow_sinkhorn(scores, 0.1, 3)).double()
    assert torch.allclose(sinkhorn(scores, 0.1, 3), expected, rtol=1e-6)
    even = sinkhorn(scores, 0.1, 200)
    assert torch.allclose(even.sum(0), torch.full((5,), 9 / 5).double())
    assert torch.allclose(even.sum(1), torch.ones(9).double())


def test_projector_has_two_layers_and_no_norm_after_the_last(params: Params) -> None:
    projector = SwAV(build_encoder(params.model, params.data), 32, 12, 0.2, PARAMS).projector
    assert [type(layer) for layer in projector] == [nn.Linear, SyncBatchNorm1d, nn.ReLU, nn.Linear]
    assert [tuple(projector[i].weight.shape) for i in (0, 3)] == [(32, 16), (12, 32)]


def test_prototype_that_no_image_is_near_makes_no_nan() -> None:
    scores = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    assert torch.allclose(sinkhorn(scores, 0.001, 3), torch.full((2, 2), 0.5))


def test_hard_assignments_of_any_scores_are_probabilities() -> None:
    torch.manual_seed(0)
    scores = F.normalize(torch.randn(64, 8), dim=1) @ F.normalize(torch.randn(8, 32), dim=0)
    for epsilon in (1e-3, 5e-3, 0.05, 10):
        assert torch.allclose(sinkhorn(scores, epsilon, 3).sum(1), torch.ones(64), atol=1e-5)


@pytest.mark.parametrize("views", [2, 5])
def test_loss_equals_the_slow_reference(views: int) -> None:
    z, prototypes = [torch.randn(6, 4).double() * 3 for _ in range(views)], torch.randn(7, 4).double()
    expected = slow_loss(z, prototypes, 0.2)
    assert swapped_loss(z, prototypes, 0.2, PARAMS).item() == pytest.approx(expected, rel=1e-6)


def test_model_gives_the_loss_of_its_projections_and_no_gradient_passes_the_targets(params: Params) -> None:
    model = SwAV(build_encoder(params.model, params.data), 32, 16, 0.2, PARAMS).eval().double()
    views, small = torch.randn(2, 6, 1, 8, 8).double(), torch.randn(2, 6, 1, 4, 4).double()
    z = [model.projector(features_of_view(model.encoder, View(images))) for images in (*views, *small)]
    loss = model(View(views[0]), View(views[1]), 0.5, small)
    assert loss.item() == pytest.approx(slow_loss(z, model.prototypes.weight, 0.2), rel=1e-6)
    loss.backward()
    unit = F.normalize(model.prototypes.weight, dim=1)
    assert (model.prototypes.weight.grad * unit).sum(1).abs().max() < 1e-9  # their length has no effect
    assert {n for n, p in model.named_parameters() if p.grad is None} == {"encoder.pos_embed"}


@pytest.mark.parametrize(("progress", "frozen"), [(0.0, True), (0.24, True), (0.25, False), (1.0, False)])
def test_prototypes_are_frozen_in_the_first_part(progress: float, frozen: bool, params: Params) -> None:
    model = SwAV(build_encoder(params.model, params.data), 32, 16, 0.2, PARAMS)
    with torch.no_grad():
        model.prototypes.weight[0, 0] = 0  # has a gradient too
    model(*(View(torch.randn(6, 1, 8, 8)) for _ in range(2)), progress).backward()
    assert model.prototypes.weight.grad is not None
    assert bool((model.prototypes.weight.grad == 0).all()) == frozen
