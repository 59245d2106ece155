"""How precisely to compute: the type of matrix products, and what stays in single precision."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from lgp.errors import LgpError
from lgp.params.run import RunParams

P = ParamSpec("P")
# where a CPU that multiplies bf16 gains from it: benchmarks/README.md
BF16_FROM_WIDTH = 192


def choose_precision(settings: RunParams, device: torch.device, width: int) -> torch.dtype:
    """Turn `run.precision` (`auto`, `fp32` or `bf16`) into the type of matrix products.

    `auto` takes bf16 where the device multiplies it natively: on CUDA always, on a CPU for encoders from a width of
    192 on, below which conversion costs more than it gains.

    Raises:
        LgpError: bf16 is asked for on a CUDA device without it.
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


def place(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Move a model to the device that is to train it, and set up what it computes with there."""
    torch.use_deterministic_algorithms(device.type == "cpu")
    # memory that is written before it is read needs no filling
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    model.to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # of the patch projection, a convolution
        if precision == torch.float32:
            # products in TF32, the losses' too; under bf16 these stay in full single precision
            torch.set_float32_matmul_precision("high")


def in_single_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Make a function of tensors compute in single precision where mixed precision is on: losses and norms."""

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            return function(*args, **kwargs)
        raised = [a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args]
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*raised, **kwargs)  # type: ignore[arg-type]

    return computed
