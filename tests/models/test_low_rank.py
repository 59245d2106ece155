"""Low-rank updates against a slow version of W + scale · B A, and the plain layer that they are merged into."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lgp.models.low_rank import LowRankQkv, merge_low_rank

WIDTH, RANK, ALPHA = 6, 2, 3.0


def layer(bias: bool = True, started: bool = True) -> LowRankQkv:
    """A layer in double precision; after a training its updates are not 0."""
    qkv = LowRankQkv(nn.Linear(WIDTH, 3 * WIDTH, bias=bias).double(), RANK, ALPHA)
    if started:
        with torch.no_grad():
            qkv.up.normal_()
    return qkv


def slow_weight(qkv: LowRankQkv) -> Tensor:
    """Return W + (alpha / r) · B A, entry by entry: queries in the first rows, values in the last."""
    weight, up, down = (tensor.detach().clone() for tensor in (qkv.weight, qkv.up, qkv.down))
    for number, first in ((0, 0), (1, 2 * WIDTH)):
        for row in range(WIDTH):
            for column in range(WIDTH):
                product = sum(float(up[number, row, k] * down[number, k, column]) for k in range(RANK))
                weight[first + row, column] += 3.0 / 2 * product
    return weight


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_updates_of_any_rank_reach_queries_and_values(rank: int) -> None:
    qkv, tokens = LowRankQkv(nn.Linear(WIDTH, 3 * WIDTH).double(), rank, ALPHA), torch.randn(2, 5, WIDTH).double()
    nn.init.normal_(qkv.up)
    of_queries, of_values = (3.0 / rank * tokens @ (up @ down).T for up, down in zip(qkv.up, qkv.down, strict=True))
    expected = tokens @ qkv.weight.T + qkv.bias + torch.cat([of_queries, 0 * of_queries, of_values], dim=-1)
    assert torch.allclose(qkv(tokens), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_merged_weight_are_those_of_the_slow_version(bias: bool) -> None:
    qkv, tokens = layer(bias), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    weight = slow_weight(qkv)
    plain = qkv.merged()
    assert type(plain) is nn.Linear
    assert torch.allclose(plain.weight, weight, rtol=0, atol=1e-12)
    expected = tokens @ weight.T + (qkv.bias if bias else 0)
    assert torch.allclose(qkv(tokens), expected, rtol=0, atol=1e-12)
    assert torch.allclose(plain(tokens), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(qkv.weight, weight, atol=1e-3)
    assert torch.equal(plain.weight[WIDTH : 2 * WIDTH], qkv.weight[WIDTH : 2 * WIDTH])  # the keys have no update


def test_layer_starts_as_the_plain_one() -> None:
    plain = nn.Linear(WIDTH, 3 * WIDTH)
    tokens = torch.randn(2, 5, WIDTH)
    expected = plain(tokens)
    qkv = LowRankQkv(plain, RANK, ALPHA)
    assert torch.equal(qkv(tokens), expected)
    assert torch.equal(qkv.merged().weight, plain.weight)
    for down in LowRankQkv(nn.Linear(WIDTH, 3 * WIDTH), 200, ALPHA).down:  # uniform, as LoRA's code draws it
        assert 0.97 * WIDTH**-0.5 < down.abs().max() <= WIDTH**-0.5


def test_only_the_updates_learn_and_their_gradients_are_those_of_the_slow_version() -> None:
    qkv, tokens = layer(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    (qkv(tokens) ** 2).sum().backward()
    assert {name for name, p in qkv.named_parameters() if p.grad is not None} == {"down", "up"}
    down, up = (p.detach().clone().requires_grad_() for p in (qkv.down, qkv.up))
    updates = [1.5 * up[0] @ down[0], torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 1.5 * up[1] @ down[1]]
    ((tokens @ (qkv.weight + torch.cat(updates)).T + qkv.bias) ** 2).sum().backward()
    assert torch.allclose(qkv.down.grad, down.grad, rtol=0, atol=1e-9)
    assert torch.allclose(qkv.up.grad, up.grad, rtol=0, atol=1e-9)


def test_copies_are_layers_of_their_own_and_all_are_merged() -> None:
    first = nn.Sequential(layer())
    both = nn.ModuleDict({"encoder": first, "momentum_encoder": copy.deepcopy(first)})
    with torch.no_grad():
        both["encoder"][0].up.add_(1)  # type: ignore[index]
    weights = [slow_weight(part[0]) for part in both.values()]  # type: ignore[index]
    assert not torch.allclose(*weights)
    merge_low_rank(both)
    assert [type(part[0]) for part in both.values()] == [nn.Linear, nn.Linear]  # type: ignore[index]
    assert all(
        torch.allclose(part[0].weight, weight, rtol=0, atol=1e-12)  # type: ignore[index]
        for part, weight in zip(both.values(), weights, strict=True)
    )
    assert both.state_dict().keys() == {f"{part}.0.{name}" for part in both for name in ("weight", "bias")}
