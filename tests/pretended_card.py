"""A CUDA device that is pretended on the CPU: tests of where tensors lie need no card.

Tensors that go to `cuda` stay on the CPU and are marked. An operation on marked and unmarked tensors fails as it does
with CUDA, and so does one that CUDA lacks and that was used once. Python code sees `cuda` as the device of marked
tensors.

Not pretended are kernels, precision and the compiler of a card (`tests/cuda` needs one), other threads, and generators.
A tensor without dimensions crosses everywhere, where a few of CUDA's operations refuse it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")
# copies cross; `Module.to` asks the second, and sets the data of a parameter
CROSSING = {"copy_", "_has_compatible_shallow_copy_type", "__set__"}
INDEXING = {"__getitem__", "__setitem__", "index_put_"}  # of a tensor on the card the indices may lie on the CPU
MOVING = {"to", "cpu"}
TO_NUMPY = {"numpy", "__array__"}
PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "einsum", "conv2d", "scaled_dot_product_attention"}


class PretendedCard(TorchFunctionMode):
    """While it is active, `cuda` is a device.

    Attributes:
        operations: on the device so far.
        products: of matrices, convolutions and attentions that were computed on the CPU all the same.
    """

    def __init__(self) -> None:
        """Begin with nothing on the device."""
        super().__init__()
        self.operations = self.products = 0
        self._marked: dict[int, StorageWeakRef] = {}  # storages; a weak reference keeps the address from others

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Do what torch asks for, as if there were a device."""
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is torch.device or name == "_parse_to":  # the latter is of `Module.to`: what do its arguments mean
            return func(*args, **kwargs)
        if name == "__get__":
            return self._attribute(args[0], func(*args))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [self._has(t) for t in tensors]
        if name in TO_NUMPY and any(there):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        apart = any(there) and any(x.ndim and not t for x, t in zip(tensors, there, strict=True))
        if name in INDEXING:
            of_indices = [self._has(x) for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            apart = (any(of_indices) and not there[0]) or (
                bool(of_indices) and len(args) > 2 and apart and not there[-1]
            )
        if apart and name not in CROSSING | MOVING:
            raise RuntimeError(f"Expected all tensors to be on the same device, in {resolve_name(func) or name}")
        if name == "scatter_reduce" and there[0] and tensors[0].dtype == torch.bool:
            raise NotImplementedError("\"cuda_scatter_gather_base_kernel_func\" not implemented for 'Bool'")
        found = func(*map(_of_cpu, args), **{key: _of_cpu(value) for key, value in kwargs.items()})
        wanted = CPU if name == "cpu" else _asked_for(args, kwargs)
        if name in MOVING:
            to_others = there[-1] if len(tensors) > 1 and wanted is None else there[0]  # `t.to(other)`
            on_card = to_others if wanted is None else wanted == CARD
            is_same = found.untyped_storage()._cdata == tensors[0].untyped_storage()._cdata
            found = found.clone() if on_card != there[0] and is_same else found
        else:
            on_card = (there[0] if name == "copy_" else any(there)) if wanted is None else wanted == CARD
            self.products += name in PRODUCTS and not on_card
        if on_card:
            self.operations += 1
            for leaf in tree_leaves(found):
                self._mark(leaf)
        return found

    def _attribute(self, of: Any, found: Any) -> Any:
        if not isinstance(of, Tensor) or not self._has(of):
            return found
        self._mark(found)  # a gradient, or another view of it
        return CARD if isinstance(found, torch.device) else found

    def _has(self, tensor: Tensor) -> bool:
        mark = self._marked.get(tensor.untyped_storage()._cdata)
        return mark is not None and not mark.expired()

    def _mark(self, leaf: Any) -> None:
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            self._marked[storage._cdata] = StorageWeakRef(storage)


def _asked_for(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.device | None:
    """Return the device that the arguments name, if they do."""
    devices = [
        x
        for x in (kwargs.get("device"), *args)
        if isinstance(x, torch.device) or (isinstance(x, str) and x in ("cpu", "cuda"))
    ]
    return (CARD if torch.device(devices[0]).type == "cuda" else CPU) if devices else None


def _of_cpu(value: Any) -> Any:
    return CPU if isinstance(value, torch.device) else "cpu" if isinstance(value, str) and value == "cuda" else value


@contextmanager
def pretended_card() -> Iterator[PretendedCard]:
    """Let `run.device: cuda` choose the device, and pretend it."""
    found = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    precision, deterministic = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch, PretendedCard() as card:
        patch.setattr("lgp.compute.device.torch", SimpleNamespace(cuda=found, device=torch.device))
        patch.setattr("torch.cuda.is_bf16_supported", lambda **_: False)
        yield card
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic)
