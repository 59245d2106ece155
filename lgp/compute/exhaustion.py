"""Errors that say that memory or disk ran out, in one line with what to lower. Torch's are known by their text."""

import errno
import re

from lgp.compute.interruption import GO_ON
from lgp.errors import is_disk_full, one_line

LOWER = "lower the batch size of the stage, or cut its batches by run.accumulate, or end other programs"
MEMORY = "memory ran out"
# what a RuntimeError of torch says → what ran out, and what to do. The first that matches counts.
KINDS = (
    (r"CUDA out of memory|CUDA error: out of memory", "the memory of the GPU is full", LOWER),
    (
        r"shared memory|\bshm\b|Bus error",
        "the shared memory of the processes that read images is full",
        "lower run.workers, or give /dev/shm more room (`docker run --shm-size`)",
    ),
    (
        r"DataLoader worker \(pid.*\) (exited|is killed)",
        "a process that reads images was killed, perhaps as memory ran out",
        "lower run.workers, or end other programs",
    ),
    (r"[Cc]an(.t|not) allocate memory", MEMORY, LOWER),
)


def said(error: BaseException) -> str | None:
    """Return the line for an error of memory or disk, None for any other error."""
    if isinstance(error, OSError) and is_disk_full(error):
        return f"disk full while writing {error.filename or 'a file'}: free some space and run again"
    text = one_line(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return _line(MEMORY, text, LOWER)
    if isinstance(error, RuntimeError):
        for pattern, what, how in KINDS:
            if re.search(pattern, text):
                return _line(what, text, how)
    return None


def _line(what: str, text: str, how: str) -> str:
    """Write what ran out, the first two sentences of the error, and what to do."""
    return f"{what} ({'. '.join(text.split('. ')[:2])[:160]}): {how}, then {GO_ON}"
