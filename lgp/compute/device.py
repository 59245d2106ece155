"""The device of a computation, and its number of threads."""

import ctypes
import os
from functools import cache

import torch
from threadpoolctl import threadpool_limits

from lgp.compute.launch import launched
from lgp.errors import LgpError
from lgp.params.run import RunParams

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)


def choose_device(settings: RunParams) -> torch.device:
    """Turn `run.device` (`auto`, `cpu` or `cuda`) into a device, and prepare that device.

    On a CPU it sets the number of threads: `run.threads`, or an equal part of the cores for each of several processes.
    On CUDA it chooses the device of this process.

    Raises:
        LgpError: CUDA is requested and absent, or there are fewer CUDA devices than processes.
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
        _limit_threads(settings.threads or max(_threads_at_first() // processes, 1))
    _keep_freed_memory()
    return torch.device("cpu")


@cache
def _threads_at_first() -> int:
    return torch.get_num_threads()


def _limit_threads(threads: int) -> None:
    """Give all libraries so many threads: torch, and the pools of scikit-learn, NumPy and SciPy, which are their own.

    A thread of OpenMP that waits for a busy core spins. k-means then takes 6 to 16 times as long as with one thread.
    """
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the libraries that are not loaded yet


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step. It would otherwise fetch and clear memory in each step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    # some versions accept at most 32 MiB; a trim threshold alone would end glibc's own adaptation
    if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
