"""Evaluations of frozen encoders, computed together where DVC asks for one after another.

A new Python takes longer to load its libraries than such an evaluation takes. So the first one that `dvc repro` runs
also computes those that the next stages will ask for, in forks of one process that has the libraries loaded, on all
cores. Their outputs wait in `.lgp/ahead`. Each stage takes its own, if its parameters, inputs and code are still those.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lgp.compute.interruption import ASKING, stops_held
from stages.evaluation import spec_of
from stages.options import DEFAULT_PARAMS
from stages.paths import PREPARED, encoder_files

if TYPE_CHECKING:
    from lgp.params.file import Params
    from lgp.workflow.stage import StageSpec

FROZEN = ("linear", "fewshot", "propagate", "selected")
MOST_IMAGES = 50_000  # with more, an evaluation takes longer than loading does
MOST_JOBS = 8  # each holds features in memory
# what the evaluations import, by name: a stage's code is what its own modules reach, not what these do
LIBRARIES = (
    "cli",
    "lgp.evaluate.linear",
    "lgp.evaluate.selection",
    "lgp.features.of_encoder",
    "lgp.report.figures",
    "lgp.workflow.mlflow_store",
    "lgp.workflow.publishing",
)


@dataclass(frozen=True)
class Call:
    """A command that evaluates a frozen encoder: its name, the arm, and the name of the labels where it has one."""

    name: str
    arm: str
    labels: str | None = None

    @property
    def words(self) -> list[str]:
        """The command line."""
        return [self.name, self.arm, *([self.labels] if self.labels else [])]

    def specs(self) -> "list[StageSpec]":
        """Describe its evaluations as stages."""
        from lgp.params.file import selected_tasks
        from lgp.workflow.pipeline import SECTIONS

        task = "-".join([self.name, *([self.labels] if self.labels else [])])
        tasks = selected_tasks(self.labels) if self.name == "selected" and self.labels else (task,)
        return [spec_of(self.arm, task, SECTIONS[self.name]) for task in tasks]


def taken(call: Call, params_file: Path, fresh: bool) -> bool:
    """Return whether the outputs of a command are there: it was computed ahead, or is now together with others.

    Only commands that DVC runs are computed together. `fresh` discards what waits.
    """
    if "DVC_STAGE" not in os.environ or params_file != DEFAULT_PARAMS:
        return False
    from lgp.workflow.ahead import discard, take

    if fresh:
        discard(call.specs())
        return False
    said = take(call.specs(), params_file)
    if said is None:
        others = _others(call, params_file)
        if not others:
            return False
        _compute([call, *others], params_file)
        said = take(call.specs(), params_file)
        if said is None:  # it failed, and does so again where its error is shown
            return False
    print(said, end="", flush=True)
    return True


def _others(call: Call, params_file: Path) -> list[Call]:
    """Return the other commands of the parameters whose outputs are not made yet; none where a fork does not pay."""
    from lgp.data.stored import StoredImages
    from lgp.params.file import load_params
    from lgp.workflow.ahead import is_made

    params = load_params(params_file)
    if sys.platform != "linux" or _for_some_stages() or not (PREPARED / "meta.json").exists():
        return []
    if len(StoredImages(PREPARED).sizes) > MOST_IMAGES or _on_cuda(params):
        return []
    labels = {"fewshot": params.few_labels, "propagate": params.propagated, "selected": params.selected}
    arms = [arm for arm in params.arms if all(file.exists() for file in encoder_files(arm))]
    # on augmented images the probe is a training, which takes long
    calls = [Call("linear", arm) for arm in arms if params.linear.method == "sweep"]
    calls += [Call(name, arm, of) for name, names in labels.items() for arm in arms for of in names]
    if call not in calls:
        return []
    return [other for other in calls if other != call and not is_made(other.specs(), params)]


def _for_some_stages() -> bool:
    """Return whether DVC was asked for evaluations by name, as in `dvc repro fewshot@graft-1pct` or `… fewshot`."""
    import psutil

    try:
        above = [process.cmdline() for process in psutil.Process().parents()]
    except psutil.Error:
        return False
    asked = [words[words.index(how) + 1 :] for words in above for how in ("repro", "run") if how in words]
    names = [word.rpartition("/")[2].rpartition(":")[2] for words in asked for word in words]
    return any("@" in name or name in FROZEN for name in names)


def _on_cuda(params: "Params") -> bool:
    """Return whether evaluations run on a CUDA device, which does not outlive a fork."""
    import torch

    return params.run.device != "cpu" and torch.cuda.device_count() > 0


def _compute(calls: Sequence[Call], params_file: Path) -> None:
    """Run commands in forks of this process. Their outputs wait. One that fails leaves nothing."""
    from lgp.compute.processes import cores
    from lgp.params.file import load_params
    from lgp.workflow.ahead import AHEAD, project_root
    from lgp.workflow.code_digest import code_digests
    from lgp.workflow.mlflow_store import load

    code = code_digests(project_root())  # a fork digests the files as they are later, and runs what is loaded now
    for library in LIBRARIES:
        import_module(library)
    load()
    jobs = min(MOST_JOBS, max(1, cores() // (load_params(params_file).run.threads or cores())))
    print(f"{len(calls)} evaluations are computed together, {min(jobs, len(calls))} at a time", flush=True)
    arms = {call.arm: call for call in reversed(calls)}  # the first of each arm caches the features of the others
    first = [call for call in calls if arms[call.arm] is call]
    AHEAD.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial.", dir=AHEAD) as folder:
        for group in (first, [call for call in calls if call not in first]):
            _run(group, jobs, Path(folder), code)


def _run(calls: Sequence[Call], jobs: int, folder: Path, code: Mapping[str, str]) -> None:
    """Run commands in forks, `jobs` at a time. Their output goes into files of a folder."""
    from lgp.workflow.ahead import discard, finish

    waiting, running = list(calls), dict[ForkProcess, Call]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                call = waiting.pop(0)
                discard(call.specs())
                log = folder / "-".join(call.words)
                with stops_held() as release, _signals_masked():
                    given = (call.words, log, release)
                    process = multiprocessing.get_context("fork").Process(target=_command, args=given)
                    process.start()
                    running[process] = call
            wait([process.sentinel for process in running])
            for process in [process for process in running if process.exitcode is not None]:
                call = running.pop(process)
                if process.exitcode == 0:
                    said = (folder / "-".join(call.words)).read_text(encoding="utf-8", errors="backslashreplace")
                    finish(call.specs(), said, code)
                else:
                    discard(call.specs())
    finally:
        for process in running:
            process.terminate()
        for process, call in running.items():
            process.join()
            discard(call.specs())


@contextmanager
def _signals_masked() -> Iterator[None]:
    """Let a fork begin with the signals masked that ask it to stop. One that comes before Python runs would be lost."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _command(words: Sequence[str], log: Path, take_stops: Callable[[], None]) -> None:
    """Run a command of `lgp` in this fork, to its end or to that of the process above."""
    from lgp.compute.processes import stop_with_parent
    from lgp.workflow.ahead import COMPUTES_AHEAD

    with log.open("w", encoding="utf-8") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    take_stops()  # what is said of one goes into the log from here on
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the process above asks to stop
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    stop_with_parent()
    del os.environ["DVC_STAGE"]  # the fork itself computes
    os.environ[COMPUTES_AHEAD] = "1"
    import_module("cli").app(list(words), prog_name="lgp")
