"""Starting a command again in several processes, as `torchrun` does; `run.processes` asks for it."""

import logging
import signal
import sys
from typing import NoReturn

from lgp.errors import LgpError


def launch(name: str, processes: int) -> NoReturn:
    """Run this very command in `processes` processes on this machine, and exit as they do.

    Raises:
        LgpError: one of them died; the others are stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what it has to say of a process that died is said below, in a line
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
        # who was killed first, then who says what is wrong, last who was stopped (SIGTERM) for its sake
        rank, failure = min(e.failures.items(), key=lambda f: (f[1].exitcode == -signal.SIGTERM, f[1].exitcode > 0))
        if failure.exitcode > 0:  # an error or a wish to stop, and it has said which
            sys.exit(failure.exitcode)
        raise LgpError(
            f"{name}: process {rank} of {processes} (process id {failure.pid}) ended with {failure.signal_name()}, the "
            "others were stopped: run the same command again, it goes on from its last state"
        ) from None
    sys.exit(0)
