"""Where to compute."""

import torch

from lgp.errors import LgpError


def choose_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device; raise `LgpError` where CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise LgpError("run.device is cuda, but torch finds no CUDA device: set it to auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
