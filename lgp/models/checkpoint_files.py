"""Checkpoint files of strangers: read by content, without running code, and checked before anything is made of them."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lgp.errors import LgpError

# The command line in MAE's checkpoints is a Namespace. Its multi-node command puts paths into it: they are read as pure
# paths, which touch no disk and exist on every system. Python 3.13 pickles them under another name.
PLAIN_OBJECTS: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]
# how a file begins that is often taken for a checkpoint → what it is, and what to do
NO_CHECKPOINTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: get it with `git lfs pull`",
    b"<!doctype": "is a web page: the address is that of a page about the file, or wants a login; download it again",
    b"<html": "is a web page: the address is that of a page about the file, or wants a login; download it again",
    b"\x89hdf": "is HDF5, as TensorFlow and Keras write it: convert it to a state_dict of timm",
    b"\x1f\x8b": "is compressed (gzip): unpack it first",
}
ARRAYS = (
    "holds arrays of NumPy (.npz), as JAX's ViT has them: timm reads them (`timm.create_model(NAME, "
    "checkpoint_path=FILE)`); save its state_dict as .safetensors"
)
WRAPPERS = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, and of trainers


def read_tensors(path: Path) -> Any:
    """Read a file as tensors in plain containers. Its content says what it is, not its name.

    Raises:
        LgpError: the file is missing or damaged, is no checkpoint, or is a pickle of anything but tensors. Such a
            pickle is never run.
    """
    try:
        if refusal := _no_checkpoint(path):
            raise LgpError(f"{path} {refusal}")
        if _is_safetensors(path):
            return load_file(path)
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except LgpError:
        raise
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL (\S+)", str(e))
        raise LgpError(
            f"{path} holds more than tensors{f' ({found.group(1)})' if found else ''}, and reading that would run code "
            "from the file: refused. Save its state_dict alone, best as .safetensors"
        ) from None
    except Exception as e:  # noqa: BLE001 - readers of damaged files raise any exception
        raise LgpError(f"{path} cannot be read as a checkpoint: {' '.join(str(e).split())[:200]}") from None


def _no_checkpoint(path: Path) -> str | None:
    """Say what a file is that is no checkpoint, and what to do; None if it may be one."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start.strip(b"\0"):
        return "is empty: the download broke off; get it again"
    for beginning, what in NO_CHECKPOINTS.items():
        if start.lstrip().lower().startswith(beginning):
            return what
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return ARRAYS if any(name.endswith(".npy") for name in archive.namelist()) else None
    return None


def _is_safetensors(path: Path) -> bool:
    """Return whether a file begins as safetensors: the length of its header in eight bytes, then JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= path.stat().st_size - 8


def unwrapped(tensors: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return tensors without the prefix that all their names share, if it is one of `WRAPPERS`."""
    found = dict(tensors)
    for prefix in WRAPPERS:
        if found and all(isinstance(name, str) and name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def fault_of(tensor: Tensor) -> str | None:
    """Say why a tensor is no weight, None if it is one. Nothing is computed of a tensor that is none.

    A weight is a dense floating-point tensor with as much memory as its shape needs. It is finite in single precision.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is {'quantised' if tensor.is_quantized else 'sparse'}, not a dense tensor of floats"
    if tensor.is_meta:
        return "has a shape and no values"
    if not tensor.is_floating_point():
        return f"is of type {str(tensor.dtype).removeprefix('torch.')}, not of floats"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"has the shape {tuple(tensor.shape)}, and fewer values than that"
    if not tensor.to(torch.float32).isfinite().all():
        return "holds values that are not finite in single precision"
    return None
