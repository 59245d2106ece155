"""Trainings beside each other. DVC runs one stage after another; several DVC processes may share a project.

Each training is a DVC process of its own for that one stage. DVC locks what a stage reads and writes, and adds its
entry to `dvc.lock` under its lock of the project.
"""

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import psutil

from lgp.compute.interruption import Interrupted
from lgp.compute.processes import cores
from lgp.errors import LgpError
from lgp.params.run import RunParams
from lgp.workflow.pending import PIPELINE, Pending

TRAININGS = ("mim", "cl", "graft", "finetune", "semi")  # the stages that take long, and one core at a time
MOST = 4  # each has a model and a batch in memory


def at_a_time(run: RunParams) -> int:
    """Return how many trainings this machine has cores for; 1 where they would share a GPU."""
    import torch

    if run.processes > 1 or (run.device != "cpu" and torch.cuda.device_count() > 0):
        return 1
    return min(MOST, max(1, cores() // (run.threads or cores())))


def waiting(found: Pending) -> dict[str, Set[str]]:
    """Return the trainings that `dvc repro` would run, each with the trainings that it waits for.

    One that reads from another pipeline, as from a control of the paper, is left out: whether that is due is not known
    here. So is one that waits for any other stage that is due.
    """
    due = {*found.changed, *found.behind}
    here = {name for name in due if not any(":" in other for other in found.needs[name])}
    trainings = {name for name in here if name.partition("@")[0] in TRAININGS}
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
    processes = Processes()
    with ThreadPoolExecutor(jobs) as pool, processes.ended_by_signals():
        while left or running:
            busy = {*left, *running.values()}
            ready = [name for name in left if not left[name] & busy]
            for name in sorted(ready, key=lambda name: -_chain(name, needs))[: jobs - len(running)]:
                del left[name]
                command = dvc("repro", "--single-item", f"{PIPELINE}:{name}")
                running[pool.submit(processes.run, command, True)] = name
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


class Processes:
    """Processes of DVC that end when this one is asked to stop."""

    def __init__(self) -> None:
        """Begin without any."""
        self._begun: list[subprocess.Popen[str]] = []
        self._stops, self._lock = False, threading.Lock()

    def run(self, command: list[str], by_line: bool = False) -> int:
        """Run a command to its end and return its exit status.

        Args:
            command: with its words.
            by_line: print its output here, line by line, so that the lines of several commands do not mix.
        """
        pipe, both = (subprocess.PIPE, subprocess.STDOUT) if by_line else (None, None)
        with self._lock:
            if self._stops:
                return 1
            process = subprocess.Popen(command, stdout=pipe, stderr=both, text=True, errors="replace")
            self._begun.append(process)
        for line in process.stdout or ():
            print(line, end="", flush=True)
        if process.stdout is not None:
            process.stdout.close()
        return process.wait()

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Let the processes end where a signal ends the block, and wait until their trainings have saved.

        Ctrl-C reaches them by itself: DVC waits for its training then. Other signals reach this process alone. A
        training notices that the DVC process which started it is gone.
        """
        try:
            yield
        except BaseException as e:
            with self._lock:
                self._stops = True
            trainings = [t for p in self._begun if p.poll() is None for t in _below(p.pid)]
            if isinstance(e, Interrupted) or not isinstance(e, KeyboardInterrupt):
                for process in self._begun:
                    process.terminate()
            for process in self._begun:
                process.wait()
            psutil.wait_procs(trainings)
            raise


def _below(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
