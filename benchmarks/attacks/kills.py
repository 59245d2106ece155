"""Stages that are killed at random moments: the same command again gives the bytes of an undisturbed run.

A round kills one command several times, by one signal each, and lets it end. Every second kill waits for a resume state
that is being written, if the command writes any.
"""

import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from forks import STOPPING, TRACEBACK, Ended, Fork
from project import COMMANDS, Template, differences, digests, run, start
from tried import Tried

SIGNALS = (signal.SIGKILL, *STOPPING)
KILLS_PER_ROUND = 4
STOPS_IN_S = 60.0  # a training finishes its step


def _saving(project: Path) -> bool:
    return any(project.glob(".lgp/resume/*/*/*.new"))


def _wait(running: Fork, project: Path, seconds: float, while_saving: bool) -> None:
    """Wait for the moment of the kill: after some seconds, or, if that comes first then, while a state is written."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not running.ended():
        if while_saving and _saving(project):
            return
        time.sleep(0.0005)


def _fault(ended: Ended, number: signal.Signals) -> str | None:
    """Say why a command did not end as a signal must end it; None if it did, or was done before."""
    if ended.hung:
        return "hangs after the signal"
    if TRACEBACK in ended.output:
        return f"traceback: {ended.last_line}"
    if ended.code == 0 or (number == signal.SIGKILL and ended.code == -number):
        return None
    if ended.code < 0:
        return f"{number.name} ends it without a line"
    if ended.code != 128 + number:
        return f"ended with {ended.code} and not {128 + number}: {ended.last_line}"
    return None


def _left(project: Path) -> list[str]:
    """Return what a stage that succeeded must not leave: unfinished outputs, resume states, runs that never end."""
    left = [str(path.relative_to(project)) for path in project.rglob(".partial.*")]
    left += [str(path.relative_to(project)) for path in project.glob(".lgp/resume/**/state-*")]
    store = project / "mlflow.db"
    if store.exists():
        with closing(sqlite3.connect(store)) as connection:
            (running,) = connection.execute("SELECT count(*) FROM runs WHERE status = 'RUNNING'").fetchone()
        left += [f"{running} runs of MLflow that stay RUNNING"] if running else []
    return left


def attack(rng: random.Random, folder: Path, template: Template) -> list[Tried]:
    """Kill a command again and again, let it end, and compare its results. Return a case per kill, and the ends."""
    number = rng.randrange(len(COMMANDS))
    said = " ".join(["lgp", *COMMANDS[number]])
    project = template.before(number, folder / "project")
    results = []
    for kill in range(KILLS_PER_ROUND):
        how = rng.choice(SIGNALS)
        running = start(COMMANDS[number], project)
        _wait(running, project, rng.uniform(0, template.seconds[number]), while_saving=kill % 2 == 1)
        if running.ended():
            template.seconds[number] = running.wait().seconds  # it is faster now than when it was measured
            break
        running.send(how)
        ended = running.wait(STOPS_IN_S)
        fault = _fault(ended, how)
        if fault is None:
            results.append(Tried(how.name, told=ended.code > 0))
        else:
            results.append(Tried(how.name, f"{fault} ({said}, after {ended.seconds:.1f} s)", ended.output[-1500:]))
        if ended.code == 0:
            break
    return [*results, *_ends(run(COMMANDS[number], project), project, number, template)]


def _ends(last: Ended, project: Path, number: int, template: Template) -> list[Tried]:
    """Compare what the last call of a command has left with the results of an undisturbed run."""
    said = " ".join(["lgp", *COMMANDS[number]])
    changed, left = differences(digests(project), template.expected(number)), _left(project)
    bytes_fault = f"ends with {last.code}" if last.code else f"other bytes: {', '.join(changed)}" if changed else None
    left_fault = f"leaves {', '.join(left)}" if left and not last.code else None
    return [
        Tried(case, None if fault is None else f"{fault} ({said})", "" if fault is None else last.output[-1500:])
        for case, fault in (
            (f"the bytes after, {COMMANDS[number][0]}", bytes_fault),
            ("nothing is left behind", left_fault),
        )
    ]
