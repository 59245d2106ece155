"""Trainings beside each other. DVC runs one stage after another; several DVC processes may share a project.

Each training is a DVC process of its own for that one stage. DVC locks what a stage reads and writes, and adds its
entry to `dvc.lock` under its lock of the project.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

from lgp.compute.interruption import Interrupted
from lgp.compute.processes import cores
from lgp.errors import LgpError
from lgp.params.run import RunParams
from lgp.workflow.pending import PIPELINE, Pending

TRAININGS = ("mim", "cl", "graft", "finetune", "semi")  # the stages that take long, and one core at a time
GRACE_S = 10.0  # for a training to save its state after Ctrl-C
MOST = 4  # each has a model and a batch in memory


def at_a_time(run: RunParams) -> int:
    """Return how many trainings this machine has cores for; 1 where they would share a GPU."""
    import torch

    if run.processes > 1 or (run.device != "cpu" and torch.cuda.device_count() > 0):
        return 1
    return min(MOST, max(1, cores() // (run.threads or cores())))


def waiting(found: Pending) -> dict[str, Set[str]]:
    """Return the trainings that `dvc repro` would run, each with the trainings that it waits for.

    One that waits for another stage besides, as for a control of the paper, is left out.
    """
    due = {*found.changed, *found.behind}
    trainings = {name for name in due if name.partition("@")[0] in TRAININGS}
    needs = {name: found.needs[name] & due for name in due}
    first = {"prepare", "labels"}  # they run before
    return {name: needs[name] - first for name in sorted(trainings) if needs[name] - first <= trainings}


def run_side_by_side(needs: Mapping[str, Set[str]], jobs: int) -> None:
    """Run stages in DVC processes, `jobs` at a time. A stage begins when those that it needs are done.

    Stages that others wait for begin first. Where one fails, those that run go on to their end, and no other begins.

    Raises:
        LgpError: a stage failed.
    """
    left, failed = dict(needs), list[str]()
    running: dict[Future[int], str] = {}
    with ThreadPoolExecutor(jobs) as pool, _processes() as processes:
        while left or running:
            busy = {*left, *running.values()}
            ready = [name for name in left if not left[name] & busy]
            for name in sorted(ready, key=lambda name: -_chain(name, needs))[: jobs - len(running)]:
                del left[name]
                running[pool.submit(_run, name, processes)] = name
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(done)
                if done.result():
                    failed.append(name)
                    left.clear()
    if failed:
        raise LgpError(f"{', '.join(failed)} failed, as said above: mend that and run `lgp repro` again")


def dvc(*words: str) -> list[str]:
    """Return a command line of DVC, in this Python."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *words]


def _chain(name: str, needs: Mapping[str, Set[str]]) -> int:
    """Return the length of the longest chain of stages that wait for one another, from `name` on."""
    return 1 + max((_chain(other, needs) for other, of in needs.items() if name in of), default=0)


def _run(name: str, processes: list["subprocess.Popen[str]"]) -> int:
    """Run a stage alone and print its lines as they come. Return its exit status."""
    print(f"Running stage '{name}'", flush=True)
    command = dvc("--quiet", "repro", "--single-item", f"{PIPELINE}:{name}")
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, stdout=pipe, stderr=both, text=True, errors="replace") as process:
        processes.append(process)
        for line in process.stdout or ():
            print(line, end="", flush=True)
    return process.returncode


@contextmanager
def _processes() -> Iterator[list["subprocess.Popen[str]"]]:
    """Yield a list for processes. Where a signal ends the block, they end too.

    Ctrl-C reaches them by itself: DVC then waits for its training. Other signals reach this process alone. A training
    notices that the DVC process which started it is gone, and saves its state.
    """
    processes: list[subprocess.Popen[str]] = []
    try:
        yield processes
    except BaseException as e:
        for process in processes:
            if not isinstance(e, Interrupted):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
            process.terminate()
        raise
