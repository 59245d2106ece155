"""Trainings beside each other. DVC runs one stage after another; several DVC processes may share a project.

Each training is a DVC process of its own for that one stage. DVC locks what a stage reads and writes, and adds its
entry to `dvc.lock` under its lock of the project.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import psutil

from lgp.compute.interruption import stops_held
from lgp.compute.liveness import lives
from lgp.compute.processes import cores
from lgp.errors import LgpError
from lgp.params.run import RunParams
from lgp.workflow.pending import PIPELINE, Pending

TRAININGS = ("mim", "cl", "graft", "finetune", "semi")  # the stages that take long, and one core at a time
LOOK_EVERY_S = 0.05
MOST = 4  # each has a model and a batch in memory


def at_a_time(run: RunParams) -> int:
    """Return how many trainings this machine has cores for; 1 where they would share a GPU."""
    import torch

    if run.processes > 1 or (run.device != "cpu" and torch.cuda.device_count() > 0):
        return 1
    return min(MOST, max(1, cores() // (run.threads or cores())))


def waiting(found: Pending) -> dict[str, Set[str]]:
    """Return the trainings that `lgp repro` would run, each with the trainings that it waits for.

    One that reads from another pipeline, as from a control of the paper, is left out, and so is the control: DVC runs
    them afterwards. So is one that waits for any other stage that is due.
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
    with ThreadPoolExecutor(jobs) as pool, Processes() as processes:
        while left or running:
            busy = {*left, *running.values()}
            ready = [name for name in left if not left[name] & busy]
            for name in sorted(ready, key=lambda name: -_chain(name, needs))[: jobs - len(running)]:
                del left[name]
                running[pool.submit(processes.run_stage, name)] = name
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(done)
                if done.result():
                    failed.append(name)
                    left.clear()
    if failed:
        raise LgpError(f"{', '.join(failed)} failed, as said above: mend that and run `lgp repro` again")


def run_dvc(*words: str) -> int:
    """Run DVC in this Python, to its end, and return its exit status. A signal ends it as it ends trainings."""
    with Processes() as processes:
        return processes.begin(dvc(*words)).wait()


def dvc(*words: str) -> list[str]:
    """Return a command line of DVC, in this Python."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", *words]


def _chain(name: str, needs: Mapping[str, Set[str]]) -> int:
    """Return the length of the longest chain of stages that wait for one another, from `name` on."""
    return 1 + max((_chain(other, needs) for other, of in needs.items() if name in of), default=0)


class Processes:
    """Processes of DVC. Where a signal ends the block, they end too, and it waits until their trainings have saved.

    Ctrl-C reaches them by itself: DVC then waits for its training. Other signals reach this process alone. A training
    notices that the DVC process which started it is gone.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self._begun: list[subprocess.Popen[str]] = []
        self._lock, self._stops = threading.Lock(), False

    def begin(self, command: list[str], output: int | None = None) -> "subprocess.Popen[str]":
        """Begin a command, whose output and errors go to `output`. Raise `LgpError` if this process is to stop."""
        errors = None if output is None else subprocess.STDOUT
        with self._lock, stops_held():  # a process that begins as the block ends would not be told
            if self._stops:
                raise LgpError("stopped before it began")
            self._begun.append(
                subprocess.Popen(command, stdout=output, stderr=errors, encoding="utf-8", errors="replace")
            )
            return self._begun[-1]

    def run_stage(self, name: str) -> int:
        """Run a stage alone and return its exit status. Its lines come whole, with the name of an item of a matrix."""
        command, item = dvc("repro", "--single-item", f"{PIPELINE}:{name}"), name.partition("@")[2]
        with self.begin(command, subprocess.PIPE) as process:
            for line in process.stdout or ():
                print(f"[{item}] {line}" if item and line.strip() else line, end="", flush=True)
        return process.returncode

    def __enter__(self) -> "Processes":
        """Return the processes."""
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """End them if there is an error."""
        if error is None:
            return
        with self._lock:
            self._stops = True
        running = [process for process in self._begun if process.poll() is None]
        trainings = [training for process in running for training in _below(process.pid)]
        if type(error) is not KeyboardInterrupt:  # which is Ctrl-C
            for process in running:
                process.terminate()
        for process in running:
            process.wait()
        while any(lives(training) for training in trainings):  # in a container nobody may collect those that ended
            time.sleep(LOOK_EVERY_S)


def _below(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
