"""Nearest-neighbour alignment against a slow reference written from MIM-Refiner's section 3."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgp.models.refine import EMPTY, Drawn, Queue, Refine, neighbour_loss
from lgp.models.vit import View, build_encoder, features_of_last_blocks, features_of_view
from lgp.params.file import Params
from lgp.params.pretrain import RefineParams

SETTINGS = RefineParams(queue=40, neighbours=3, average=0.25)


def cosine(a: Tensor, b: Tensor) -> float:
    return (a @ b / (a.norm() * b.norm())).item()


def slow_neighbour_loss(p: Tensor, z: Tensor, n: Tensor, temperature: float) -> float:
    """Row i: the neighbour of z_i against its own prediction, z_i against all others."""
    total = 0.0
    for i in range(len(z)):
        logits = [cosine(n[i] if j == i else z[i], p[j]) / temperature for j in range(len(p))]
        total -= math.log(math.exp(logits[i]) / sum(map(math.exp, logits)))
    return total / len(z)


def slow_neighbour(z: Tensor, own: int, queue: list[tuple[int, Tensor]], drawn: float, most: int) -> Tensor:
    """One of the `most` nearest projections of other images. Without any, z itself."""
    others = sorted((entry for entry in queue if entry[0] != own), key=lambda entry: -cosine(z, entry[1]))[:most]
    return others[int(drawn * len(others))][1] if others else z


def model_of(params: Params, **changes: int) -> Refine:
    torch.manual_seed(0)
    settings = SETTINGS.model_copy(update=changes)
    return Refine(build_encoder(params.model, params.data), 32, 16, 24, 0.3, settings, 1000).double()


def drawn_for(batch: int, first: int) -> Drawn:
    return Drawn(torch.arange(first, first + batch), torch.rand(2, batch), 40)


def test_head_has_a_projector_of_three_layers_and_a_predictor_of_two(params: Params) -> None:
    (head,) = model_of(params)._heads()
    layers = [[m.out_features for m in part if isinstance(m, nn.Linear)] for part in (head.projector, head.predictor)]
    assert layers == [[32, 32, 16], [24, 16]]


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_equals_the_slow_reference_and_swaps_only_the_positive(temperature: float) -> None:
    p, z, n = (torch.randn(6, 5).double() * scale for scale in (1, 2, 3))
    expected = slow_neighbour_loss(p, z, n, temperature)
    assert neighbour_loss(p, z, n, temperature).item() == pytest.approx(expected, rel=1e-6)
    assert slow_neighbour_loss(p, z, z, temperature) != pytest.approx(expected, rel=1e-3)


def test_queue_gives_the_drawn_one_of_the_nearest_of_other_images() -> None:
    queue = Queue(8, 4).double()
    kept: list[tuple[int, Tensor]] = []
    targets, ids = torch.randn(5, 4).double(), torch.tensor([0, 3, 4, 20, 1])
    for first in (0, 3, 6):  # 9 entries in 8 places: the first one is overwritten
        projections = torch.randn(3, 4).double()
        queue.add(projections, torch.arange(first, first + 3))
        kept += list(enumerate(projections, first))
        for drawn in (torch.zeros(5), torch.full((5,), 0.999), torch.rand(5)):
            expected = [
                slow_neighbour(target, own, kept[-8:], d, 3)
                for target, own, d in zip(targets, ids.tolist(), drawn.tolist(), strict=True)
            ]
            assert torch.equal(queue.neighbours(targets, drawn, ids, 3), torch.stack(expected))


def test_target_without_a_neighbour_is_its_own() -> None:
    queue, targets, ids = Queue(8, 4), torch.randn(2, 4), torch.tensor([5, 6])
    assert torch.equal(queue.neighbours(targets, torch.rand(2), ids, 3), targets)
    queue.add(torch.randn(1, 4), torch.tensor([5]))
    near = queue.neighbours(targets, torch.rand(2), ids, 3)
    assert torch.equal(near[0], targets[0])
    assert torch.equal(near[1], queue.projections[0])


def test_batch_larger_than_the_queue_leaves_its_last_projections() -> None:
    queue, projections = Queue(4, 3), torch.randn(10, 3)
    queue.add(projections, torch.arange(10))
    assert sorted(queue.ids.tolist()) == [6, 7, 8, 9]
    for place, image in enumerate(queue.ids.tolist()):
        assert torch.equal(queue.projections[place], projections[image])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("count", [0, 3])
def test_model_sums_its_heads_losses_over_all_pairs_with_a_large_view(heads: int, count: int, params: Params) -> None:
    """In evaluation mode, so that BatchNorm is a fixed function. The queue is filled by hand."""
    model = model_of(params, heads=heads).eval()
    for head in model._heads():
        head.queue.add(torch.randn(12, 16).double(), torch.arange(12))
    views, small = torch.randn(2, 4, 1, 8, 8).double(), torch.randn(3, 4, 1, 4, 4).double()[:count]
    drawn = drawn_for(4, 2)
    total = 0.0
    for place, head in enumerate(model._heads()):
        features = [features_of_last_blocks(model.encoder, View(images), heads)[place] for images in (*views, *small)]
        z = [head.projector(of_view) for of_view in features]
        p = [head.predictor(of_view) for of_view in z]
        queue = list(zip(head.queue.ids.tolist(), head.queue.projections, strict=True))
        queue = [entry for entry in queue if entry[0] != EMPTY]
        terms = []
        for u in (0, 1):
            near = [
                slow_neighbour(z[u][i], int(drawn.ids[i]), queue, drawn.neighbour[u, i].item(), 3) for i in range(4)
            ]
            terms += [slow_neighbour_loss(p[v], z[u], torch.stack(near), 0.3) for v in range(len(features)) if v != u]
        assert len(terms) == 2 + 2 * count
        total += sum(terms) / len(terms)
    loss = model(View(views[0]), View(views[1]), drawn, small if count else None)
    assert loss.item() == pytest.approx(total, rel=1e-6)


def test_gradient_is_that_of_the_slow_loss_with_constant_targets(params: Params) -> None:
    model = model_of(params).eval()
    views, drawn = torch.randn(2, 4, 1, 8, 8).double(), drawn_for(4, 0)
    model(View(views[0]), View(views[1]), drawn).backward()
    weight = model.projector[0].weight
    found, weight.grad = weight.grad.clone(), None
    (head,) = model._heads()
    z = [head.projector(features_of_view(model.encoder, View(images))) for images in views]
    p = [F.normalize(head.predictor(of_view), dim=1) for of_view in z]
    terms = []
    for u, v in ((0, 1), (1, 0)):  # the queue is empty, so each target is its own neighbour
        logits = F.normalize(z[u].detach(), dim=1) @ p[v].T / 0.3
        terms.append((torch.logsumexp(logits, dim=1) - logits.diagonal()).mean())
    (sum(terms) / 2).backward()
    assert torch.allclose(found, weight.grad, rtol=1e-6)


def test_features_of_the_last_block_are_the_encoders_and_the_others_have_no_norm(params: Params) -> None:
    encoder, images = build_encoder(params.model, params.data).eval(), torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        encoder.norm.weight.normal_()
    seen: list[Tensor] = []
    hook = encoder.blocks[-2].register_forward_hook(lambda *args: seen.append(args[2]))
    found = features_of_last_blocks(encoder, View(images), 2)
    hook.remove()
    assert torch.allclose(found[1], features_of_view(encoder, View(images)), atol=1e-6)
    assert torch.equal(found[0], seen[0][:, 0])


def test_training_fills_the_queue_with_the_first_views_projections_and_no_gradient_passes_targets(
    params: Params,
) -> None:
    model = model_of(params).train()
    (head,) = model._heads()
    seen: list[Tensor] = []
    head.projector.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    loss = model(View(torch.randn(4, 1, 8, 8).double()), View(torch.randn(4, 1, 8, 8).double()), drawn_for(4, 7))
    assert head.queue.ids[:4].tolist() == [7, 8, 9, 10]
    assert torch.equal(head.queue.projections[:4], seen[0])
    loss.backward()
    assert {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert all(p.grad is None for p in model.averaged_encoder.parameters())
    model.eval()(View(torch.randn(4, 1, 8, 8).double()), View(torch.randn(4, 1, 8, 8).double()), drawn_for(4, 0))
    assert head.queue.ids[4:].eq(EMPTY).all()  # only training fills it


def test_average_follows_the_encoder_with_a_time_constant_of_a_part_of_the_steps(params: Params) -> None:
    """Of 40 steps, a quarter: θ̄ ← 0.9 θ̄ + 0.1 θ, before each loss."""
    model = model_of(params).train()
    expected = [p.detach().clone() for p in model.encoder.parameters()]
    for step in range(3):
        with torch.no_grad():
            for p in model.encoder.parameters():
                p.add_(torch.randn_like(p))
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.encoder.parameters(), strict=True)]
        model(View(torch.randn(4, 1, 8, 8).double()), View(torch.randn(4, 1, 8, 8).double()), drawn_for(4, 4 * step))
    for e, p in zip(expected, model.averaged_encoder.parameters(), strict=True):
        assert torch.allclose(e, p, rtol=1e-9)
    assert model.published_encoder is model.averaged_encoder


@pytest.mark.parametrize(("images", "places"), [(100, 40), (60, 30), (1, 1), (None, 40)])
def test_queue_holds_at_most_half_of_the_images(images: int | None, places: int, params: Params) -> None:
    model = Refine(build_encoder(params.model, params.data), 32, 16, 24, 0.3, SETTINGS, images)
    assert len(model._heads()[0].queue.ids) == places
    assert not any(".queue." in name for name in model.heads())
