"""Errors that say that memory or disk ran out, in one line with what to lower. Torch's are known by their text."""

import re

from lgp.compute.interruption import GO_ON
from lgp.errors import is_disk_full

LOWER = "lower the batch size of the stage, or cut its batches by run.accumulate, or end other programs"
# what an error says → what ran out, and what to do. The first that matches counts.
KINDS = (
    (r"CUDA out of memory|CUDA error: out of memory", "the memory of the GPU is full", LOWER),
    (
        r"shared memory|\bshm\b|Bus error",
        "the shared memory of the processes that read images is full",
        "lower run.workers, or give /dev/shm more room (`docker run --shm-size`)",
    ),
    (
        r"DataLoader worker",
        "a process that reads images was killed, perhaps as memory ran out",
        "lower run.workers, or end other programs",
    ),
    (r"[Cc]an.t allocate memory|Unable to allocate|^MemoryError", "memory ran out", LOWER),
)


def said(error: BaseException) -> str | None:
    """Return the line for an error of memory or disk, None for any other error."""
    if isinstance(error, OSError) and is_disk_full(error):
        return f"disk full while writing {error.filename or 'a file'}: free some space and run again"
    if not isinstance(error, RuntimeError | MemoryError | OSError):
        return None
    text = " ".join(str(error).split()) or type(error).__name__
    for pattern, what, how in KINDS:
        if re.search(pattern, text):
            return f"{what} ({'. '.join(text.split('. ')[:2])[:160]}): {how}, then {GO_ON}"
    return None
