"""Several processes for one command, started as `torchrun` starts them. `run.processes` is their number.

Light: torch is imported only to start them.
"""

import logging
import os
import signal
import sys
from typing import NoReturn

from lgp.errors import LgpError


class WorkerDone(Exception):  # noqa: N818 - no error
    """Ends every process but the first. Only the first process publishes the result."""


class Stopped(SystemExit):
    """Ends a process with 1 and without a word: the first process of its machine says why."""

    def __init__(self) -> None:
        """Set the exit code."""
        super().__init__(1)


def launched() -> bool:
    """Return whether `torchrun` started this process, by hand or through `run.processes`."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_rank() -> int:
    """Return the number of this process among those that `torchrun` started, from 0. It is 0 without `torchrun`."""
    return int(os.environ["RANK"]) if launched() else 0


def machines() -> int:
    """Return the number of machines that `torchrun` started this command on. It is 1 without `torchrun`."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) if launched() else 1


def machine() -> int:
    """Return the number of this machine among them, from 0."""
    return int(os.environ.get("GROUP_RANK", 0)) if launched() else 0


def launch(name: str, processes: int) -> NoReturn:
    """Run this same command in `processes` processes on this machine. Exit with their exit code.

    Raises:
        LgpError: a process was killed. The others are stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun's tracebacks are silenced: the error below names the process that died
    for logger in [n for n in logging.root.manager.loggerDict if n.startswith("torch.distributed.elastic")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except SignalException as e:
        sys.exit(128 + e.sigval)
    except ChildFailedError as e:
        # the error names a process that was killed, else one that exited, else one that torchrun stopped (SIGTERM)
        rank, failure = min(e.failures.items(), key=lambda f: (f[1].exitcode == -signal.SIGTERM, f[1].exitcode > 0))
        if failure.exitcode > 0:  # that process has printed its own error or message
            sys.exit(failure.exitcode)
        perhaps = ", perhaps as memory ran out" if failure.exitcode == -signal.SIGKILL else ""
        raise LgpError(
            f"{name}: process {rank} of {processes} (process id {failure.pid}) ended with {failure.signal_name()}"
            f"{perhaps}, the others were stopped: run the same command again, it goes on from its last state"
        ) from None
    sys.exit(0)
