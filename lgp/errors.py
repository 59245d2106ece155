"""Errors that people can act on, as the command line prints them: one line."""

import errno
import shutil
from pathlib import Path


class LgpError(Exception):
    """A mistake in parameters, data or environment.

    The message says what was given, what is valid and what to do, in one line.
    """


def is_disk_full(error: OSError) -> bool:
    """Tell whether an error of the file system means that no space, or no quota, is left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise `LgpError` where the disk of `folder`, which need not be there yet, has less than `needed_bytes` free."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise LgpError(
            f"disk full: {folder} has {free / 2**20:.0f} MiB free, this needs about "
            f"{needed_bytes / 2**20:.0f} MiB for its state and results: free some space and run again"
        )
