"""Errors that a user can act on. The command line prints each on one line."""

import errno
import re
import shutil
from pathlib import Path


class LgpError(Exception):
    """A mistake in parameters, data or environment.

    The message is one line. It says what was given, what is valid and what to do.
    """


class NoSource(LgpError):  # noqa: N818 - it says what is the case
    """A source of images that is not at its place, as on a machine that only trains."""


class Diverged(LgpError):  # noqa: N818 - it says what is the case
    """A training whose loss or weights are not finite. All processes of a training raise it in the same step."""


class NotTrained(LgpError):  # noqa: N818 - it says what is the case
    """A training that failed its checks. A stage publishes its outputs before it fails with this error."""


def without_credentials(text: str) -> str:
    """Leave out users, passwords and signatures in the addresses that a text holds."""
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1?…", re.sub(r"://[^/\s]*@", "://", text))


def escaped(text: str) -> str:
    """Return text of unknown origin as one line: what cannot be printed becomes the escape that Python writes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened(text: str, most: int) -> str:
    """Return text of unknown origin on one line, cut after `most` characters."""
    line = escaped(text)
    return line if len(line) <= most else f"{line[:most]}…"


def is_disk_full(error: OSError) -> bool:
    """Return whether a file-system error means that no space or no quota is left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise `LgpError` if the disk of `folder` has less than `needed_bytes` free. `folder` need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise LgpError(
            f"disk full: {folder} has {free / 2**20:.0f} MiB free, this needs about "
            f"{needed_bytes / 2**20:.0f} MiB for its state and results: free some space and run again"
        )
