"""What one step of a training takes, counted: parameters, FLOPs, and the bytes that live.

The code that trains runs once on fake tensors, which have a shape but no data. Every figure follows from that code. The
model may be larger than the memory of this machine.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

BATCH = 2  # images in the counted step: BatchNorm needs two, and all counts are proportional to it
Build = Callable[[], tuple[nn.Module, Callable[[], Tensor]]]


@dataclass(frozen=True)
class Cost:
    """The cost of a training step: parameters, trained parameters, and FLOPs an image."""

    parameters: int
    trained: int
    flops_per_image: float


@contextmanager
def _without_data(build: Build) -> Iterator[tuple[nn.Module, Callable[[], Tensor]]]:
    """Build a model and the function of its loss, whose tensors have shapes but no data inside the block."""
    with torch.device("meta"):
        model, loss_of = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        model.to_empty(device="cpu")
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        yield model, loss_of


def measure(build: Build) -> Cost:
    """Count one step, forward and backward.

    Args:
        build: returns a model, and the function of its loss on `BATCH` images.
    """
    counter = FlopCounterMode(display=False)
    with _without_data(build) as (model, loss_of), counter:
        loss_of().backward()
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(parameters, trained, counter.get_total_flops() / BATCH)


class _Living(TorchDispatchMode):
    """Counts the bytes of all tensors that live, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._seen: set[int] = set()

    def see(self, tensor: Tensor) -> None:
        """Count a tensor from now on, as long as it lives."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage: int, size: int) -> None:
        self._seen.discard(storage)
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return result


@dataclass(frozen=True)
class Memory:
    """Bytes of a step in single precision: before it, at its peak, and when its loss is known."""

    standing: float
    peak: float
    at_loss: float


def measure_memory(build: Build, passes: int = 1) -> Memory:
    """Count the bytes that live during a step: weights, AdamW's moments, gradients, activations and what passes by.

    Args:
        build: returns a model, and the function of its loss.
        passes: forward and backward passes of the step, whose gradients are summed.
    """
    with _without_data(build) as (model, loss_of), _Living() as living:
        for tensor in (*model.parameters(), *model.buffers()):
            living.see(tensor)
        learning = [p for p in model.parameters() if p.requires_grad]
        moments = [torch.empty_like(p) for p in learning * 2]
        standing = living.bytes
        for _ in range(passes):
            loss = loss_of()
            at_loss = living.bytes
            loss.backward()
        del moments, loss
    return Memory(standing, living.peak, at_loss)
