"""The linear probe: one product for all heads does what training each alone would do."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lgp.compute.randomness import generator
from lgp.evaluate import probe
from lgp.evaluate.calibration import brier_score
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


def test_validation_chooses_and_of_equals_the_best_probabilities(params: Params) -> None:
    linear = LinearParams.model_validate(params.linear.model_dump() | {"base_lrs": [1e-9, 0.1, 1.0, 3.0]})
    features, labels = separable()
    trained = heads(head_settings(linear, 256)).double()
    train_heads(trained, features, labels, 20, BATCH, seed=0)
    probabilities = trained.logits(features).double().softmax(1)
    accuracies = (probabilities.argmax(1) == torch.from_numpy(labels)[:, None]).double().mean(0)
    briers = [brier_score(probabilities[..., head].numpy(), labels) for head in range(8)]
    chosen = choose_head(trained, linear, features, labels)
    assert chosen.val == accuracies.max()
    equal = [head for head in range(8) if accuracies[head] == accuracies.max()]
    assert len(equal) > 2
    assert chosen.head == min(equal, key=lambda head: briers[head]) != equal[0]
    assert trained.scores(features, labels)[1] == pytest.approx(briers, rel=1e-9)
    assert (chosen.base_lr, chosen.weight_decay) == list(itertools.product(linear.base_lrs, linear.weight_decays))[
        chosen.head
    ]
    assert chosen.val == (trained.logits(features, chosen.head).argmax(1).numpy() == labels).mean()


def test_head_that_diverged_is_never_chosen(params: Params) -> None:
    features, labels = separable()
    some = heads(head_settings(params.linear, 256)).double()
    with torch.no_grad():
        some.weight.view(WIDTH, CLASSES, -1)[..., 3] = torch.nan
    assert [of_heads[3] for of_heads in some.scores(features, labels)] == [-1, 2]


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


def test_loss_of_an_impossible_label_is_finite() -> None:
    logits = torch.tensor([[[0.0], [1000.0]]], dtype=torch.float64)
    loss = cross_entropy_of_heads(logits, torch.tensor([0])).item()
    assert loss == pytest.approx(-np.log(torch.finfo(torch.float64).tiny))


def test_heads_start_from_one_draw_of_small_weights_and_biases_of_zero() -> None:
    some = heads([(0.3, 0.0), (3.0, 0.1), (0.7, 0.0)])
    start = 0.01 * torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(0))
    for number in range(3):
        weight, bias = some.head(number)
        assert np.allclose(weight, start.T.numpy())
        assert not bias.any()
    (group,) = some.optimizer().param_groups
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (3.0, 0, 0)
    assert (some.decayed, heads([(0.3, 0.0)]).decayed) == (True, False)
    assert {name: of.dtype for name, of in some.named_buffers()} == {
        "rate_ratio": torch.float64, "decay_ratio": torch.float64,
    }  # fmt: skip
    features, labels = (torch.from_numpy(array) for array in separable())
    assert some.loss(features.float(), labels).dtype == torch.float32


@pytest.mark.parametrize("batch_norm", [False, True])
def test_one_head_is_read_as_weight_and_bias_on_the_features_as_they_are(batch_norm: bool) -> None:
    features, labels = separable()
    features = 3 + 2 * features
    features[:, 0] *= 1e-4
    some = heads([(0.1, 0.0), (1.0, 0.0)], batch_norm)
    train_heads(some, features, labels, 10, BATCH, seed=0)
    if isinstance(some.norm, nn.BatchNorm1d):
        some.norm.running_var[0] = 1e-7  # so little that the norm's eps of 1e-6 counts
    logits = some.logits(features).numpy()
    for number in (0, 1):
        weight, bias = some.head(number)
        assert weight.dtype == bias.dtype == np.float64
        assert np.allclose(features @ weight.T + bias, logits[..., number], atol=1e-4)


@pytest.mark.parametrize("images", [1, 3, 4, 9])
def test_scores_are_the_same_in_pieces(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = (array[:images] for array in separable())
    some = heads([(0.1, 0.0), (1.0, 0.0)], batch_norm=True)
    train_heads(some, *separable(), EPOCHS, BATCH, seed=0)
    whole = some.logits(features), *some.scores(features, labels)
    monkeypatch.setattr(probe, "SCORED_ROWS", 4)
    assert not some.train().logits(features).requires_grad
    assert torch.allclose(some.train().logits(features), whole[0])
    accuracies, briers = some.train().scores(features, labels)
    assert np.array_equal(accuracies, whole[1])
    assert briers == pytest.approx(whole[2], rel=1e-12)
    expected = (whole[0].argmax(1).numpy() == labels[:, None]).mean(0)
    assert whole[1] == pytest.approx(expected)


def test_accuracy_of_no_image_is_zero() -> None:
    assert heads([(0.1, 0.0)] * 3).scores(np.empty((0, WIDTH)), np.empty(0, dtype=int))[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_weight_that_is_not_finite_rules_a_head_out(bad: float) -> None:
    features, labels = separable()
    some = heads([(0.1, 0.0)] * 3)
    with torch.no_grad():
        some.weight.view(WIDTH, CLASSES, -1)[4, 2, 1] = bad
    accuracies, _ = some.scores(features, labels)
    assert accuracies[1] == -1
    assert min(accuracies[[0, 2]]) >= 0


def test_products_are_of_the_precision_that_is_asked_for() -> None:
    features, labels = separable()
    weights = []
    for precision in (torch.float32, torch.bfloat16):
        some = heads([(0.5, 1e-3)])
        train_heads(some, features.astype(np.float32), labels, 2, BATCH, 0, precision)
        weights.append(some.weight.detach())
    assert not torch.equal(*weights)
    assert torch.allclose(*weights, atol=1e-2)
    assert weights[1].dtype == torch.float32


def test_gradients_of_the_step_before_are_gone() -> None:
    features, labels = separable()
    some = heads([(0.5, 0.0)])
    some.weight.grad = torch.full_like(some.weight, 100.0)
    fresh = heads([(0.5, 0.0)])
    for each in (some, fresh):
        train_heads(each, features, labels, 1, BATCH, seed=0)
    assert torch.equal(some.weight, fresh.weight)


@pytest.mark.parametrize(("briers", "chosen"), [([0.0, 0, 0, 0.5, 0.5, 0], 3), ([0.0, 0, 0, 0.5, 0.4, 0], 4)])
def test_choice_is_the_best_with_its_base_rate_and_decay(
    briers: list[float], chosen: int, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = params.linear.model_copy(update={"base_lrs": [0.1, 0.2, 0.3], "weight_decays": [0.0, 0.5]})
    asked: list[tuple[np.ndarray, np.ndarray]] = []
    scores = np.array([0.1, 0.2, 0.4, 0.7, 0.7, 0.6]), np.array(briers)
    monkeypatch.setattr(LinearHeads, "scores", lambda _, *about: asked.append(about) or scores)  # type: ignore[func-returns-value]
    x, y = separable()
    expected = {3: probe.Chosen(3, 0.2, 0.5, 0.7), 4: probe.Chosen(4, 0.3, 0.0, 0.7)}
    assert choose_head(heads([(0.1, 0.0)]), linear, x, y) == expected[chosen]
    assert asked[0][0] is x
    assert asked[0][1] is y
    assert head_settings(linear, 128) == [(lr / 2, decay) for lr in (0.1, 0.2, 0.3) for decay in (0.0, 0.5)]
