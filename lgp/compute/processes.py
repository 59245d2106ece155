"""A pool of processes that end with this one, for work on images that needs no torch."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from lgp.errors import LgpError


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def pool(workers: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes. At the end of the block, work that has not begun is dropped.

    Args:
        workers: their number. None: one per core.

    Raises:
        LgpError: a process died.
    """
    # a forked process need not import anything again
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    executor = ProcessPoolExecutor(workers or cores(), context, initializer=_begin_worker)
    try:
        yield executor
    except BrokenProcessPool:
        raise LgpError(
            "a process that decodes images was killed, perhaps as memory ran out: end other programs and run again; "
            "`lgp prepare` goes on where it was"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Leave Ctrl-C to the main process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a broken pool ends its other processes by SIGTERM
        signal.signal(number, signal.SIG_DFL)
    stop_with_parent()


def stop_with_parent() -> None:
    """Send SIGTERM to this process when the process that forked it dies."""
    threading.Thread(target=_stop_after_parent, daemon=True).start()


def _stop_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
