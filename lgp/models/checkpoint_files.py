"""Checkpoint files of strangers: read by content, without running code, and checked before anything is made of them."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lgp.errors import LgpError, escaped, one_line, shortened

# The command line in MAE's checkpoints is a Namespace. Its multi-node command puts paths into it: they are read as pure
# paths, which touch no disk and exist on every system. Python 3.13 pickles them under another name.
PLAIN_OBJECTS: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]
PAGE = "is a web page: the address is that of a page about the file, or wants a login; download it again"
PACKED = "is compressed or an archive: unpack it first"
CUT = "is cut off: the download broke off; get it again"
ZIP = (b"PK\x03\x04", b"PK\x05\x06")  # a safetensors file begins with its length, which may read PK
# how a file begins that is often taken for a checkpoint → what it is, and what to do
NO_CHECKPOINTS = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: get it with `git lfs pull`",
    b"<!doctype": PAGE,
    b"<html": PAGE,
    b"\x89hdf": "is HDF5, as TensorFlow and Keras write it: convert it to a state_dict of timm",
    b"\x93numpy": "is an array of NumPy (.npy): a checkpoint holds a tensor for each weight",
    b"gguf": "is GGUF, whose weights are quantised: get the checkpoint that it was made from",
    **dict.fromkeys((b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"rar!"), PACKED),
}
TAR = (257, b"ustar")  # where a tar says that it is one
ARRAYS = (
    "holds arrays of NumPy (.npz), as JAX's ViT has them: timm reads them (`timm.create_model(NAME, "
    "checkpoint_path=FILE)`); save its state_dict as .safetensors"
)
PROGRAM = "is a program of TorchScript: save the state_dict of its model, best as .safetensors"
# smaller floats are quantised, with a scale
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PICKLE = b"\x80"  # how a pickle begins
BEGINNING = 40  # bytes of a file that a message shows
LONGEST_NAME = 100  # characters of a tensor's name in a message
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
        # as an open file, because torch chooses the reader of a path by its name
        with path.open("rb") as file, torch.serialization.safe_globals(PLAIN_OBJECTS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols of pickle, and of quantised tensors
            return torch.load(file, map_location="cpu", weights_only=True)
    except LgpError:
        raise
    except pickle.UnpicklingError as e:
        raise LgpError(f"{path} {_no_tensors(path, str(e))}") from None
    except Exception as e:  # noqa: BLE001 - readers of damaged files raise any exception
        raise LgpError(f"{path} cannot be read as a checkpoint: {one_line(e)[:200]}") from None


def _no_tensors(path: Path, refused: str) -> str:
    """Say why a file was refused as one of tensors: it would run code, or is something else."""
    found = re.search(r"GLOBAL (\S+)", refused)
    with path.open("rb") as file:
        start = file.read(BEGINNING)
    if found or start.startswith(PICKLE):
        return (
            f"holds more than tensors{f' ({found.group(1)})' if found else ''}, and reading that would run code from "
            "the file: refused. Save its state_dict alone, best as .safetensors"
        )
    text = escaped(start.decode(errors="backslashreplace"))
    return f'is no checkpoint (it begins with "{text}"): give a .pth, .pt or .safetensors of tensors'


def _no_checkpoint(path: Path) -> str | None:
    """Say what a file is that is no checkpoint, and what to do; None if it may be one."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start.strip(b"\0"):
        return "is empty: the download broke off; get it again"
    for beginning, what in NO_CHECKPOINTS.items():
        if start.lstrip(b" \t\r\n\xef\xbb\xbf").lower().startswith(beginning):
            return what
    if start[TAR[0] :].startswith(TAR[1]):
        return PACKED
    return _no_archive_of_torch(path) if start.startswith(ZIP) else None


def _no_archive_of_torch(path: Path) -> str | None:
    """Say what a ZIP archive is that `torch.save` did not write, or that is damaged. Nothing is unpacked."""
    if not zipfile.is_zipfile(path):
        return CUT
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            return ARRAYS
        if any(name.endswith("/constants.pkl") for name in names):
            return PROGRAM
        if not any(name.endswith("/data.pkl") for name in names):
            return f"is an archive without a checkpoint ({escaped(', '.join(names[:3]))}, …): unpack it first"
        # compressed parts may be larger than all memory, and `torch.save` compresses nothing
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            return "was packed again with compression: unpack it, and pack it without, or save it with `torch.save`"
        if damaged := archive.testzip():
            return f"is damaged ({damaged} does not fit its checksum): get it again, or save it again with `torch.save`"
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


def shown(name: Any) -> str:
    """Return the name of a tensor as text for a message: on one line, and cut if it is long."""
    return shortened(str(name), LONGEST_NAME)


def fault_of(tensor: Tensor) -> str | None:
    """Say why a tensor is no weight, None if it is one. Nothing is computed of a tensor that is none.

    A weight is a dense tensor of floats with as much memory as its shape needs. It is finite in single precision.
    """
    if fault := _fault_of_form(tensor):
        return fault
    if tensor.dtype not in WEIGHT_DTYPES:
        return f"is of type {_dtype(tensor)}, not of floats of 16, 32 or 64 bits"
    if not tensor.to(torch.float32).isfinite().all():
        return "holds values that are not finite in single precision"
    return None


def fault_of_count(tensor: Tensor) -> str | None:
    """Say why a tensor is no count, such as the `num_batches_tracked` of a BatchNorm; None if it is one."""
    if fault := _fault_of_form(tensor):
        return fault
    if tensor.numel() != 1 or tensor.dtype != torch.int64:
        return f"is {tuple(tensor.shape)} of type {_dtype(tensor)}, not one whole number of 64 bits"
    return None


def _fault_of_form(tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is {'quantised' if tensor.is_quantized else 'sparse'}, not a dense tensor of floats"
    if tensor.is_meta:
        return "has a shape and no values"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"has the shape {tuple(tensor.shape)}, and fewer values than that"
    return None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def object_beside(file: Path) -> dict[str, Any]:
    """Read the JSON file beside a checkpoint, as timm and lgp write it; an empty dict if there is none.

    Raises:
        LgpError: it cannot be read, is no JSON, or no object.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        fault = e.strerror if isinstance(e, OSError) else one_line(e)[:100]
    else:
        if isinstance(found, dict):
            return found
        fault = "no object of names and values"
    raise LgpError(f"{file} beside the checkpoint is damaged ({fault}): mend it, or move the checkpoint away")
