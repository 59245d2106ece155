"""The attacks judge as they should: what counts as held, and what as a failure."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from lgp.errors import LgpError

sys.path.insert(0, str(ROOT / "benchmarks" / "attacks"))
from forks import Ended, Fork, take_signals
from kills import _fault as fault_of_kill
from project import differences, digests
from tried import Wrong, fault_of, tried

LINE, TRACEBACK = "error: x is damaged\n", "Traceback (most recent call last):\n  File x\nKeyError: 1\n"


@pytest.mark.parametrize(
    ("ended", "fault"),
    [
        (Ended(0, "", 1), None),
        (Ended(1, f"warning: y\n{LINE}", 1), None),
        (Ended(1, "", 1), "ended with 1 and 0 lines of error"),
        (Ended(1, LINE * 2, 1), "ended with 1 and 2 lines of error"),
        (Ended(1, TRACEBACK, 1), "traceback: KeyError: 1"),
        (Ended(0, TRACEBACK, 1), "traceback: KeyError: 1"),
        (Ended(-11, "", 1), "ended with -11"),
        (Ended(-9, "", 60, hung=True), "hangs"),
    ],
)
def test_end_of_a_command_is_judged(ended: Ended, fault: str | None) -> None:
    found = fault_of(ended)
    assert found is None if fault is None else str(found).startswith(fault)


@pytest.mark.parametrize(
    ("code", "number", "held"),
    [
        (-9, signal.SIGKILL, True),
        (0, signal.SIGKILL, True),
        (1, signal.SIGKILL, False),
        (143, signal.SIGTERM, True),
        (-15, signal.SIGTERM, False),
        (130, signal.SIGINT, True),
        (1, signal.SIGINT, False),
        (129, signal.SIGHUP, True),
    ],
)
def test_end_by_a_signal_is_judged(code: int, number: signal.Signals, held: bool) -> None:
    assert (fault_of_kill(Ended(code, "stopped\n", 1), number) is None) == held


def told() -> None:
    raise LgpError("x is damaged: make it anew")


def broken() -> None:
    raise KeyError("x")


def wrong() -> None:
    raise Wrong("another result")


@pytest.mark.parametrize(
    ("action", "fault", "said"),
    [(print, None, False), (told, None, True), (broken, "'x'", False), (wrong, "another", False)],
)
def test_case_in_a_fork_is_judged(tmp_path: Path, action: Callable[[], None], fault: str | None, said: bool) -> None:
    result = tried("a case", action, tmp_path)
    assert (result.fault is None) == (fault is None), result
    assert result.told == said
    assert fault is None or fault in str(result.fault)


def test_fork_that_hangs_is_killed(tmp_path: Path) -> None:
    ended = Fork(lambda: signal.pause() or 0, tmp_path).wait(0.2)
    assert ended.hung


def test_signal_reaches_a_fork(tmp_path: Path) -> None:
    fork = Fork(lambda: take_signals() or signal.pause() or 0, tmp_path)
    fork.send(signal.SIGTERM)
    assert fork.wait(20).code == -signal.SIGTERM


def test_results_are_compared_and_what_lies_beside_them_is_not(tmp_path: Path) -> None:
    for name in ("models/a", ".lgp/b", "mlartifacts/c", "mlflow.db"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    before = digests(tmp_path)
    assert list(before) == ["models/a"]
    (tmp_path / "models/a").write_bytes(b"2")
    (tmp_path / "models/d").write_bytes(b"")
    assert differences(digests(tmp_path), before) == ["models/a", "models/d"]
