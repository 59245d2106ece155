"""Precision: the type of matrix products, and the functions that stay in single precision."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from lgp.errors import LgpError
from lgp.params.run import RunParams

P = ParamSpec("P")
# the width from which bf16 is faster on a CPU that multiplies it natively: benchmarks/README.md
BF16_FROM_WIDTH = 48


def choose_precision(settings: RunParams, device: torch.device, width: int) -> torch.dtype:
    """Turn `run.precision` (`auto`, `fp32` or `bf16`) into the type of matrix products.

    `auto` takes bf16 if the device multiplies it natively. On a CPU the encoder must also have a width of 48 or more:
    below that, conversion costs more than it gains.

    Raises:
        LgpError: bf16 is requested on a CUDA device without it.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if settings.precision == "bf16" and not native:
            raise LgpError(f"run.precision is bf16, which {torch.cuda.get_device_name(device)} lacks: set it to fp32")
        pays = native
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        pays = native and width >= BF16_FROM_WIDTH
    wanted = settings.precision == "bf16" or (settings.precision == "auto" and pays)
    return torch.bfloat16 if wanted else torch.float32


def choose_frozen_precision(settings: RunParams, device: torch.device) -> torch.dtype:
    """Return the type of matrix products of a network that only answers: an encoder whose features are extracted.

    On a CUDA device it is that of trainings. On a CPU it is always single precision: what is recorded does not depend
    on the kind of CPU.
    """
    return choose_precision(settings, device, 0) if device.type == "cuda" else torch.float32


def place(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Move a model to its training device, and set how that device computes."""
    torch.use_deterministic_algorithms(device.type == "cpu")
    # uninitialised memory needs no filling: it is written before it is read
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model.to(device)
    if device.type == "cpu" and precision == torch.bfloat16:
        for module in model.modules():
            if hasattr(module, "fused_attn"):  # timm's attention
                # the backward pass of torch's fused attention for a CPU is ten times as slow in bf16 as plain products
                module.fused_attn = False  # type: ignore[assignment]
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # for the patch projection, a convolution
        if precision == torch.float32:
            # products in TF32, also those of the losses; under bf16 the losses stay in full single precision
            torch.set_float32_matmul_precision("high")


def in_single_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make a function of tensors compute in single precision under mixed precision. It is for losses and norms."""

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            return function(*args, **kwargs)
        raised = [_raised(a) for a in args]
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*raised, **kwargs)

    return computed


def _raised(value: Any) -> Any:
    """Return a tensor, or those of a list, in single precision if they were in bf16. Anything else stays."""
    if isinstance(value, list):
        return [_raised(of_list) for of_list in value]
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
