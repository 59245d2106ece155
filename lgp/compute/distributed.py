"""Processes that train one model together, and the exchange of values between them. `torchrun` starts them."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lgp.compute.launch import launched, launched_rank, machines
from lgp.compute.nested import with_tensors
from lgp.compute.precision import in_single_precision
from lgp.errors import LgpError, one_line

WAIT = timedelta(minutes=30)  # for the slowest process, which may be saving a state
PIECE_BYTES = 2**30  # sent at once


def world_size() -> int:
    """Return the number of processes that train together. It is 1 without `torchrun`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def joined(name: str, device: torch.device) -> Iterator[None]:
    """Join the other processes of `torchrun` inside the block. Without `torchrun`, do nothing.

    Raises:
        LgpError: another process cannot be reached, or was lost.
    """
    if not launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    own = f"{name}: process {launched_rank()} of {os.environ['WORLD_SIZE']}"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    except RuntimeError as e:
        if not _is_of_connection(e):
            raise
        raise LgpError(
            f"{own} cannot connect to another one ({one_line(e)[:200]}): processes must reach each other on all ports, "
            "on the network interface that GLOO_SOCKET_IFNAME names"
        ) from None
    try:
        yield
    except RuntimeError as e:
        if not _is_of_connection(e):
            raise
        everywhere = " on all machines" if machines() > 1 else ""
        raise LgpError(
            f"{own} lost another one ({one_line(e)[:200]}): run again{everywhere}, it goes on from its last state"
        ) from None
    finally:
        dist.destroy_process_group()


def _is_of_connection(error: RuntimeError) -> bool:
    """Return whether an error of torch says that another process cannot be reached."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "Connection" in str(error)


def agree(request: int) -> int:
    """Return the largest request of all processes. Every process must call this at the same point of its work."""
    return agree_on([request])[0]


def agree_on(requests: list[int]) -> list[int]:
    """Return the largest of each of several requests of all processes, as `agree` does of one."""
    if world_size() == 1:
        return requests
    largest = torch.tensor(requests)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [int(request) for request in largest]


def average(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def send_bytes(data: bytes | None) -> bytes | None:
    """Send the data of the first process to all. Every process returns that data."""
    if world_size() == 1:
        return data
    length = torch.tensor(-1 if data is None else len(data))
    dist.broadcast(length, 0)
    if length < 0:
        return None
    whole = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(length), dtype=torch.uint8)
    )
    for piece in whole.split(PIECE_BYTES):
        dist.broadcast(piece, 0)
    return whole.numpy().tobytes()


def send_state(state: Any, device: torch.device) -> Any:
    """Send nested dicts and lists of the first process to all, their tensors one by one.

    Args:
        state: of the first process; those of the others are not read.
        device: where other processes get the tensors. Single numbers come to the CPU.

    Returns:
        In the first process `state` itself.
    """
    if world_size() == 1:
        return state
    sent: list[Tensor] = []

    def placed(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor.clone()
        sent.append(tensor)
        return torch.empty_like(tensor, device="meta")

    def received(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        _broadcast(whole)
        return torch.empty_like(tensor, device=device).copy_(whole) if whole.stride() != tensor.stride() else whole

    form = io.BytesIO()
    if rank() == 0:
        torch.save(with_tensors(state, placed), form)
    form = io.BytesIO(send_bytes(form.getvalue()) or b"")
    if rank() > 0:
        return with_tensors(torch.load(form, weights_only=True), received)
    for tensor in sent:
        _broadcast(tensor.to(device).contiguous())
    return state


def _broadcast(tensor: Tensor) -> None:
    """Send a contiguous tensor of any type from the first process to all, in place."""
    for piece in tensor.flatten().view(torch.uint8).split(PIECE_BYTES) if tensor.numel() else ():
        dist.broadcast(piece, 0)


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor (B, …) over all processes, in the order of their ranks: (P·B, …).

    The gradients of all processes' losses are summed. They flow back to the process that the rows came from.
    DistributedDataParallel averages the parameters' gradients over processes. If each process's loss is a mean over its
    own rows, that average is the gradient of the mean over all rows. Every process must have the same B.
    """
    if world_size() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


# torch's own differentiable collectives are deprecated in one version and missing in another
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed.chunk(world_size())[rank()]


class _Sum(torch.autograd.Function):
    """The sum over all processes. Its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(None, gradient.contiguous())


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, in single precision. With one process it is `BatchNorm1d` itself.

    torch's own SyncBatchNorm refuses CPU tensors. Every process must have the same number of rows. The state and its
    names are those of `BatchNorm1d`.
    """

    @in_single_precision
    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, D). Training takes mean and variance of all processes' rows, evaluation the running ones."""
        if world_size() == 1 or not self.training:
            normalised: Tensor = super().forward(x)
            return normalised
        rows = len(x) * world_size()
        mean = _Sum.apply(x.sum(0)) / rows
        centred = x - mean
        variance = _Sum.apply(centred.square().sum(0)) / rows
        self._remember(mean.detach(), variance.detach() * (rows / max(rows - 1, 1)))
        normalised = centred * torch.rsqrt(variance + self.eps)
        return normalised * self.weight + self.bias if self.affine else normalised

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(unbiased_variance, momentum)
