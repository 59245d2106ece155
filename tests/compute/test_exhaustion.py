"""What ran out is said in one line, with what to lower."""

import errno
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lgp.compute.exhaustion import said


class Dying(torch.utils.data.Dataset[int]):
    """Its worker is killed, as the kernel does when memory runs out."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def throw(error: BaseException) -> None:
    raise error


FULL = OSError(errno.ENOSPC, "No space left", "a.npy")
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")


@pytest.mark.parametrize(
    ("action", "line"),
    [
        (lambda: np.zeros(2**50), "memory ran out (Unable to allocate"),
        (lambda: torch.zeros(2**50), "memory ran out ("),
        (lambda: list(torch.utils.data.DataLoader(Dying(), num_workers=1)), "images was killed"),
        (lambda: throw(CUDA), "Tried to allocate 2.00 GiB):"),
        (lambda: throw(RuntimeError("unable to allocate shared memory(shm)")), "lower run.workers, or give"),
        (lambda: throw(MemoryError()), "memory ran out (MemoryError): lower the batch size"),
        (lambda: throw(OSError(errno.ENOMEM, "Cannot allocate memory")), "memory ran out ([Errno 12]"),
        (lambda: throw(FULL), "disk full while writing a.npy"),
    ],
)
def test_what_ran_out_comes_with_what_to_lower(action: Callable[[], object], line: str) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as caught:
        action()
    text = said(caught.value)
    assert text is not None, caught.value
    assert line in text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        RuntimeError("Caught Damaged in DataLoader worker process 0.\nOriginal Traceback: images.npy is damaged"),
        ValueError("CUDA out of memory"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/dev/shm/project/a.csv"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert said(error) is None
