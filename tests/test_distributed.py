"""Losses of several processes (gloo) against one process with the whole batch."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lgp.distributed import gather
from lgp.models.moco import contrastive_loss
from lgp.models.simclr import nt_xent
from lgp.models.vicreg import vicreg_loss
from lgp.params import VicregWeights

PROCESSES, ROWS, WIDTH = 2, 5, 6

Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "mocov3": lambda a, b: contrastive_loss(a, b.detach(), 0.2),
    "simclr": lambda a, b: nt_xent(a, b, 0.5),
    "vicreg": lambda a, b: vicreg_loss(a, b, VicregWeights()),
}


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of all processes, and the weight that stands for a model."""
    rng = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, WIDTH, generator=rng) for n in (PROCESSES * ROWS, PROCESSES * ROWS, WIDTH))  # type: ignore[return-value]


def loss_and_gradient(loss: Loss, x1: Tensor, x2: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    weight = weight.clone().requires_grad_()
    value = loss(x1 @ weight, x2 @ weight)
    value.backward()
    assert weight.grad is not None
    return value.detach(), weight.grad


def one_of_many(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    x1, x2, weight = embeddings()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    results = {}
    for name, loss in LOSSES.items():
        value, gradient = loss_and_gradient(loss, x1[mine], x2[mine], weight)
        for tensor in (value, gradient):  # what DistributedDataParallel does with gradients
            dist.all_reduce(tensor)
            tensor /= PROCESSES
        results[name] = (value, gradient)
    results["gathered"] = (gather(x1[mine]), gather(x1[mine].requires_grad_()).detach())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(one_of_many, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_the_whole_batch(
    name: str, results: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    value, gradient = loss_and_gradient(LOSSES[name], *embeddings())
    for of_rank in results:
        assert torch.allclose(of_rank[name][0], value, rtol=1e-5)
        assert torch.allclose(of_rank[name][1], gradient, rtol=1e-5, atol=1e-6)


def test_gather_puts_rows_in_the_order_of_ranks(results: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    for of_rank in results:
        for gathered in of_rank["gathered"]:
            assert torch.equal(gathered, embeddings()[0])
