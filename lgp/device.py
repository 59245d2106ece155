"""Where to compute, and with how many threads."""

import torch

from lgp.errors import LgpError
from lgp.params import RunParams


def choose_device(settings: RunParams) -> torch.device:
    """Turn `run.device` (`auto`, `cpu` or `cuda`) into a device, and set the number of threads on the CPU.

    Raises:
        LgpError: CUDA is asked for and absent.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise LgpError("run.device is cuda, but torch finds no CUDA device: set it to auto or cpu")
    return torch.device("cuda" if settings.device != "cpu" and cuda else "cpu")
