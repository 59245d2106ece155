"""Tensors inside of dicts and lists, as states of models and optimizers hold them."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def with_tensors(nested: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested dicts and lists with every tensor changed, in order. Anything else in them stays as it is."""
    if isinstance(nested, Tensor):
        return change(nested)
    if isinstance(nested, dict):
        changed = copy.copy(nested)  # of the same class, with its attributes: torch's states have some
        for key, value in nested.items():
            changed[key] = with_tensors(value, change)
        return changed
    return [with_tensors(value, change) for value in nested] if isinstance(nested, list) else nested


def copied(nested: Any, device: torch.device) -> Any:
    """Return nested dicts and lists with copies of their tensors on a device. Single numbers stay on the CPU.

    Optimizers count their steps there.
    """
    return with_tensors(nested, lambda t: t.to(device if t.ndim else "cpu", copy=True))
