"""Signals end any command in one line, with the code that shells expect."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# a command line whose command waits, and what runs after it
WAITING = """
import sys, time, typer
from typing import Annotated
from lgp.compute.interruption import stopped_by_signals
from stages.options import OneLineErrors

app = typer.Typer(cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False)

class Slow:
    def __del__(self) -> None:
        print("waits", flush=True)
        time.sleep(60)

def parse(value: str) -> None:
    if sys.argv[1] == "while it parses":
        print("waits", flush=True)
        time.sleep(60)

@app.command()
def wait(option: Annotated[str, typer.Option(callback=parse)] = "") -> None:
    if sys.argv[1] == "in a library":
        print("waits", flush=True)
        try:
            time.sleep(60)
        except BaseException:
            raise ValueError("a library's own error") from None
    if sys.argv[1] == "in a finalizer":
        slow = Slow()
        del slow
        time.sleep(60)
    if sys.argv[1] == "inside":
        print("waits", flush=True)
        time.sleep(60)

@app.command()
def other() -> None: ...

try:
    with stopped_by_signals():
        app(["wait"])
finally:
    if sys.argv[1] == "after":
        print("waits", flush=True)
        time.sleep(60)
"""


def started(
    where: str, ignored: signal.Signals | None = None, code: str = WAITING, folder: Path = ROOT
) -> "subprocess.Popen[str]":
    """Start the command line and wait until it waits."""

    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    process = subprocess.Popen(
        [sys.executable, "-c", code, where],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    return process


@pytest.mark.parametrize("where", ["inside", "in a finalizer", "in a library", "while it parses"])
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP")],
)
def test_signal_ends_a_command_in_one_line(number: signal.Signals, said: str, where: str) -> None:
    with started(where) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"stopped by {said}: run the same command again, a training goes on from its last state\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_after_a_command_prints_no_traceback(number: signal.Signals) -> None:
    with started("after") as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (-number, "")


def test_nohup_keeps_a_command_when_its_terminal_closes() -> None:
    with started("inside", ignored=signal.SIGHUP) as process:
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM" in errors


# both ways into the command line, with a command line that waits before any command has begun
ENTRIES = {
    "lgp": "from lgp.__main__ import main; main()",
    "cli.py": f"import runpy; runpy.run_path({str(ROOT / 'cli.py')!r}, run_name='__main__')",
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_before_a_command_begins_is_one_line_too(tmp_path: Path, number: signal.Signals, entry: str) -> None:
    waiting = (
        "import time, typer\ntyper.Typer.__call__ = lambda self, **_: (print('waits', flush=True), time.sleep(60))\n"
    )
    with started("inside", code=waiting + ENTRIES[entry], folder=tmp_path) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.startswith("stopped by ")
    assert errors.count("\n") == 1
