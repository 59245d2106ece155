"""Where to compute, with how many threads, and how precisely."""

import ctypes
import functools
import os
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from lgp.errors import LgpError
from lgp.params import RunParams

P = ParamSpec("P")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
# where a CPU that multiplies bf16 gains from it: benchmarks/README.md
BF16_FROM_WIDTH = 192


def launched() -> bool:
    """Whether `torchrun`, by hand or through `run.processes`, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def choose_device(settings: RunParams) -> torch.device:
    """Turn `run.device` (`auto`, `cpu` or `cuda`) into a device, and prepare it for its work.

    On a CPU: the number of threads, where several processes share the cores. On CUDA: the device of this process.

    Raises:
        LgpError: CUDA is asked for and absent.
    """
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise LgpError("run.device is cuda, but torch finds no CUDA device: set it to auto or cpu")
    local_rank = int(os.environ["LOCAL_RANK"]) if launched() else 0
    if settings.device != "cpu" and cuda:
        if local_rank >= torch.cuda.device_count():
            raise LgpError(
                f"process {local_rank} of this machine has no CUDA device of its own, there are "
                f"{torch.cuda.device_count()}: set run.processes to at most that, or run.device to cpu"
            )
        return torch.device("cuda", local_rank)
    processes = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1
    if settings.threads is not None or processes > 1:
        torch.set_num_threads(settings.threads or max(torch.get_num_threads() // processes, 1))
    _keep_freed_memory()
    return torch.device("cpu")


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, instead of fetching and clearing it anew each time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    # some take no more than 32 MiB; a trim threshold alone would end glibc's own adaptation
    if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


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
