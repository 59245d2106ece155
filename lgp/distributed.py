"""What crosses processes: embeddings, gathered with the gradient that data parallelism expects."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor


def world_size() -> int:
    """Return the number of processes that train together, 1 without `torchrun`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor (B, …) over all processes, in the order of their ranks: (P·B, …).

    The gradient of every process's loss flows back to the process that the rows came from, summed. Where
    each process's loss is a mean over its own rows, averaging the parameters' gradients over processes (as
    DistributedDataParallel does) then gives the gradient of the mean over all rows. Every process must have
    the same B.
    """
    if world_size() == 1:
        return tensor
    if not tensor.requires_grad:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    return torch.cat(differentiable.all_gather(tensor.contiguous()))
