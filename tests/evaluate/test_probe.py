"""The linear probe: one product for all heads does what training each alone would do."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgp.compute.randomness import generator
from lgp.evaluate.probe import LinearHeads, choose_head, cross_entropy_of_heads, head_settings, train_heads
from lgp.params.evaluate import LinearParams
from lgp.params.file import Params

CLASSES, WIDTH, IMAGES, BATCH, EPOCHS = 5, 12, 90, 32, 6
RATES = [base * scale for scale in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10) for base in (1, 3, 5, 7, 9)]
SETTINGS = list(itertools.product(RATES, (0.0, 1e-2)))


def separable(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, IMAGES)
    return rng.normal(size=(IMAGES, WIDTH)) + 2 * np.eye(CLASSES, WIDTH)[labels], labels


def heads(settings: list[tuple[float, float]], batch_norm: bool = False) -> LinearHeads:
    return LinearHeads(WIDTH, CLASSES, settings, batch_norm, torch.Generator().manual_seed(0))


def trained_alone(features: np.ndarray, labels: np.ndarray, rate: float, decay: float, batch_norm: bool) -> nn.Module:
    """Train one head as anybody would: torch's layers and SGD, a cosine over all steps, the same order of images."""
    start = heads([(rate, decay)])
    linear = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    linear.weight.data.copy_(start.weight.T)
    linear.bias.data.zero_()
    norm = nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6, dtype=torch.float64)
    model = nn.Sequential(norm, linear) if batch_norm else linear
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * (IMAGES // BATCH))
    for epoch in range(EPOCHS):
        order = torch.randperm(IMAGES, generator=generator(7, "linear/order", epoch))
        for rows in order[: IMAGES // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.from_numpy(features)[rows]), torch.from_numpy(labels)[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_seventy_heads_at_once_equal_seventy_one_after_the_other(batch_norm: bool) -> None:
    features, labels = separable()
    together = heads(SETTINGS, batch_norm).double()
    train_heads(together, features, labels, EPOCHS, BATCH, seed=7)
    logits = together.logits(features)
    assert logits.shape == (IMAGES, CLASSES, 70)
    for number, (rate, decay) in enumerate(SETTINGS):
        alone = trained_alone(features, labels, rate, decay, batch_norm)
        with torch.inference_mode():
            expected = alone(torch.from_numpy(features))
        assert torch.allclose(logits[..., number], expected, rtol=1e-6, atol=1e-6), (rate, decay)


def test_loss_and_gradient_are_torchs() -> None:
    logits = torch.randn(9, 4, 3, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(4, (9,)), torch.rand(3, dtype=torch.float64)
    ours = cross_entropy_of_heads(logits, labels)
    theirs = F.cross_entropy(logits, labels[:, None].expand(9, 3), reduction="none").mean(0)
    assert torch.allclose(ours, theirs)
    (expected,) = torch.autograd.grad(theirs @ weights, logits)
    (found,) = torch.autograd.grad(ours @ weights, logits)
    assert torch.allclose(found, expected)


def test_paper_sweep_is_35_rates_times_2_decays_scaled_by_the_batch(params: Params) -> None:
    settings = head_settings(params.linear, 512)
    assert len(settings) == 70
    assert settings[0] == (pytest.approx(2e-5), 0)
    assert settings[-1] == (pytest.approx(180), 1e-6)


def test_validation_chooses_and_of_equals_the_lowest_rate(params: Params) -> None:
    linear = LinearParams.model_validate(params.linear.model_dump() | {"base_lrs": [1e-9, 0.1, 1.0, 3.0]})
    features, labels = separable()
    trained = heads(head_settings(linear, 256)).double()
    train_heads(trained, features, labels, 20, BATCH, seed=0)
    accuracies = trained.accuracies(features, labels)
    chosen = choose_head(trained, linear, features, labels)
    assert chosen.val == accuracies.max()
    assert chosen.head == int(np.flatnonzero(accuracies == accuracies.max())[0])
    assert (chosen.base_lr, chosen.weight_decay) == list(itertools.product(linear.base_lrs, linear.weight_decays))[
        chosen.head
    ]
    assert chosen.val == (trained.logits(features, chosen.head).argmax(1).numpy() == labels).mean()


def test_head_that_diverged_is_never_chosen(params: Params) -> None:
    features, labels = separable()
    some = heads(head_settings(params.linear, 256)).double()
    with torch.no_grad():
        some.weight.view(WIDTH, CLASSES, -1)[..., 3] = torch.nan
    assert some.accuracies(features, labels)[3] == -1


def test_memory_mapped_half_precision_trains_like_the_same_numbers_in_memory(tmp_path: Path) -> None:
    features, labels = separable()
    np.save(tmp_path / "x.npy", features.astype(np.float16))
    both = []
    for given in (np.load(tmp_path / "x.npy", mmap_mode="c"), features.astype(np.float16).astype(np.float32)):
        of_given = heads([(0.5, 0.0)])
        train_heads(of_given, given, labels, EPOCHS, BATCH, seed=0)
        both.append(of_given.weight)
    assert torch.equal(*both)


def test_mixed_precision_does_not_round_rates_and_decays() -> None:
    features, labels = (torch.from_numpy(array) for array in separable())
    for decay in (0.0, 1e-1):
        settings = [(90.0, decay), (0.7, decay / 3), (31.0, decay / 7)]
        some = heads(settings)
        some.bias.data.fill_(0.5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = some.loss(features.float(), labels).item()
            of_heads = cross_entropy_of_heads(some(features.float()), labels).tolist()
        squares = [
            weights.detach().double().view(-1, 3).square().sum(0).tolist() for weights in (some.weight, some.bias)
        ]
        expected = sum(
            rate / 90 * (of_heads[h] + of_setting / 2 * (squares[0][h] + squares[1][h]))
            for h, (rate, of_setting) in enumerate(settings)
        )
        assert loss == pytest.approx(expected, rel=1e-6)
