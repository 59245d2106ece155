"""Whether trainings run beside each other in the right order, and end when they are told to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, merged
from dvc.repo import Repo
from typer.testing import CliRunner

from cli import app
from lgp.compute.interruption import Interrupted, stopped_by_signals
from lgp.errors import LgpError
from lgp.params.run import RunParams
from lgp.workflow import side_by_side
from lgp.workflow.pending import Pending
from lgp.workflow.side_by_side import at_a_time, run_side_by_side, waiting

NEEDS = {
    "cl": set[str](),
    "finetune@cl-10pct": {"cl"},
    "finetune@graft-10pct": {"mim", "graft"},
    "finetune@mim-10pct": {"mim"},
    "graft": {"mim"},
    "mim": set(),
}
# stands for DVC: notes begin and end of a stage, fails where a file says so, and waits for other files
STAGE = """
import sys, time, pathlib
name = sys.argv[-1].partition(":")[2]
folder = pathlib.Path(sys.argv[1])
with (folder / "log").open("a") as log:
    print("begin", name, file=log, flush=True)
    print(name, "works", flush=True)
    while (folder / f"hold-{name}").exists():
        time.sleep(0.01)
    print("end", name, file=log, flush=True)
sys.exit((folder / f"fail-{name}").exists())
"""


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which stages log what they do."""
    monkeypatch.setattr(side_by_side, "dvc", lambda *words: [sys.executable, "-c", STAGE, str(tmp_path), *words])
    return tmp_path


def logged(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines()


def test_each_stage_runs_once_and_after_those_that_it_needs(stages: Path) -> None:
    run_side_by_side(NEEDS, 2)
    log = logged(stages)
    assert sorted(line for line in log if line.startswith("end")) == sorted(f"end {name}" for name in NEEDS)
    for name, of in NEEDS.items():
        assert all(log.index(f"end {other}") < log.index(f"begin {name}") for other in of)


def test_two_run_at_a_time_and_stages_that_others_wait_for_begin_first(stages: Path) -> None:
    """`mim` has the longest chain of stages behind it, then `cl`; `graft` begins while `cl` runs."""
    for name in ("cl", "graft", "mim"):
        (stages / f"hold-{name}").touch()

    def let_go(condition: Callable[[list[str]], bool], name: str) -> None:
        until = time.monotonic() + 60
        while not condition(logged(stages) if (stages / "log").exists() else []) and time.monotonic() < until:
            time.sleep(0.01)
        (stages / f"hold-{name}").unlink()

    with side_by_side.ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_side_by_side, NEEDS, 2)
        let_go(lambda log: {"begin mim", "begin cl"} <= set(log), "mim")
        let_go(lambda log: "begin graft" in log, "graft")
        let_go(lambda log: "end graft" in log and sum("end finetune" in line for line in log) == 2, "cl")
        running.result()
    log = logged(stages)
    assert set(log[:2]) == {"begin mim", "begin cl"}
    assert log.index("begin graft") < log.index("begin finetune@mim-10pct")
    running_now = most = 0
    for line in log:
        running_now += 1 if line.startswith("begin") else -1
        most = max(most, running_now)
    assert most == 2


def test_output_is_printed_as_it_comes(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_side_by_side({"mim": set()}, 2)
    assert capsys.readouterr().out.splitlines() == ["mim works"]


def test_where_one_fails_the_running_ones_end_and_no_other_begins(stages: Path) -> None:
    (stages / "fail-mim").touch()
    with pytest.raises(LgpError, match="mim failed, as said above: mend that and run `lgp repro` again"):
        run_side_by_side({"cl": set(), "graft": {"mim"}, "mim": set()}, 2)
    assert sorted(logged(stages)) == ["begin cl", "begin mim", "end cl", "end mim"]


def test_signal_ends_what_runs(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stages / "hold-mim").touch()
    begun: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: begun.append(popen(*a, **k)) or begun[-1])

    def asked(*_: object, **__: object) -> None:
        while not begun:
            time.sleep(0.01)
        raise Interrupted("stopped by SIGTERM", 143)

    monkeypatch.setattr(side_by_side, "wait", asked)
    with pytest.raises(Interrupted):
        run_side_by_side({"mim": set()}, 2)
    assert [process.wait(30) for process in begun] == [-15]


def test_trainings_that_are_due_wait_for_those_that_are_due() -> None:
    needs = {
        "inputs": set[str](),
        "prepare": {"inputs"},
        "labels": {"inputs", "prepare"},
        "mim": {"inputs", "prepare"},
        "cl": {"inputs", "prepare"},
        "graft": {"inputs", "prepare", "mim"},
        "linear@graft": {"inputs", "prepare", "labels", "mim", "graft"},
        "finetune@graft-10pct": {"inputs", "prepare", "labels", "mim", "graft"},
        "controls/dvc.yaml:joint": {"inputs"},
        "finetune@joint-10pct": {"inputs", "controls/dvc.yaml:joint"},
    }
    every = Pending(
        {"prepare": ["it"], "mim": ["it"]}, ["labels", "cl", "graft", "linear@graft", *list(needs)[7:8]], needs
    )
    assert waiting(every) == {
        "cl": set(),
        "finetune@graft-10pct": {"mim", "graft"},
        "graft": {"mim"},
        "mim": set(),
    }
    assert waiting(Pending({"cl": ["it"]}, ["linear@cl"], needs | {"linear@cl": {"cl"}})) == {"cl": set()}
    blocked = Pending({"controls/dvc.yaml:joint": ["it"]}, ["finetune@joint-10pct"], needs)
    assert waiting(blocked) == {}
    # another pipeline's stages, and what reads from them, are left to DVC
    assert waiting(Pending({"mim": ["it"], "finetune@joint-10pct": ["it"]}, [], needs)) == {"mim": set()}
    assert waiting(Pending({}, [], needs)) == {}


@pytest.mark.parametrize(
    ("cores", "threads", "processes", "cards", "expected"),
    [
        (2, 1, 1, 0, 2),
        (2, None, 1, 0, 1),
        (8, 2, 1, 0, 4),
        (64, 1, 1, 0, 4),
        (1, 1, 1, 0, 1),
        (8, 1, 2, 0, 1),
        (8, 1, 1, 1, 1),
    ],
)
def test_trainings_at_a_time_are_those_that_have_a_core_and_no_gpu(
    cores: int, threads: int | None, processes: int, cards: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "cores", lambda: cores)
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    assert at_a_time(RunParams(threads=threads, processes=processes)) == expected


# notes when it began, waits until the other one began too, and writes its output
MEETS = """
import pathlib, sys, time
own, other, out = map(pathlib.Path, sys.argv[1:])
own.touch()
until = time.monotonic() + 60
while not other.exists() and time.monotonic() < until:
    time.sleep(0.01)
assert other.exists()
out.write_text(out.name)
"""


@pytest.fixture
def project(tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project whose `mim` and `cl` end only if they run at the same time."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(merged(values, {"run": {"device": "cpu", "threads": 1}})))
    Path("meets.py").write_text(MEETS)
    write = f"{sys.executable} -c \"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('it')\""
    stages: dict[str, Any] = {
        "inputs": {"cmd": "mkdir inputs && touch inputs/it", "always_changed": True, "outs": ["inputs"]},
        "prepare": {"cmd": f"{write} prepared", "deps": ["inputs"], "outs": ["prepared"]},
        "labels": {"cmd": f"{write} labelled", "deps": ["inputs", "prepared"], "outs": ["labelled"]},
        "mim": {"cmd": f"{sys.executable} meets.py a b mim.txt", "deps": ["prepared"], "outs": ["mim.txt"]},
        "cl": {"cmd": f"{sys.executable} meets.py b a cl.txt", "deps": ["prepared"], "outs": ["cl.txt"]},
        "graft": {"cmd": f"{write} graft.txt", "deps": ["mim.txt"], "outs": ["graft.txt"]},
        "report": {"cmd": f"{write} report.txt", "deps": ["graft.txt", "cl.txt"], "outs": ["report.txt"]},
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    Repo.init(no_scm=True).close()
    return tmp_path


def lgp_repro() -> int:
    result = CliRunner().invoke(app, ["repro", "--jobs", "2"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that DVC uses
def test_dvc_runs_two_trainings_at_once_and_its_lock_has_all_of_them(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lgp_repro() == 0
    assert sorted(yaml.safe_load(Path("dvc.lock").read_text())["stages"]) == [
        "cl", "graft", "inputs", "labels", "mim", "prepare", "report",
    ]  # fmt: skip
    said = capfd.readouterr().out
    assert "Running stage 'report'" in said
    assert lgp_repro() == 0
    again = capfd.readouterr().out
    assert "Running stage 'inputs'" in again
    assert all(f"Stage '{name}' didn't change, skipping" in again for name in ("mim", "cl", "graft", "report"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_training_that_fails_under_dvc_fails_the_command(project: Path) -> None:
    Path("meets.py").write_text("import sys; sys.exit(sys.argv[1] == 'b')")
    assert lgp_repro() == 1
    assert not Path("report.txt").exists()


@pytest.mark.parametrize(
    ("words", "trainings", "expected"),
    [
        ([], ["cl", "mim"], [("prepare", "labels"), 3, ("report",)]),  # as many as the machine allows
        (["--jobs", "2"], ["cl", "mim"], [("prepare", "labels"), 2, ("report",)]),
        (["--jobs", "1"], ["cl", "mim"], [("report",)]),
        (["--jobs", "2"], ["cl"], [("report",)]),  # one has nothing to run beside
        ([], [], [("report",)]),
    ],
)
def test_jobs_that_are_asked_for_are_those_that_run(
    words: list[str],
    trainings: list[str],
    expected: list[Any],
    tmp_path: Path,
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(values))
    asked: list[Any] = []
    found = Pending({name: ["it"] for name in trainings}, [], {name: set() for name in trainings})
    monkeypatch.setattr("lgp.workflow.pending.pending", lambda _: found)
    monkeypatch.setattr(side_by_side, "at_a_time", lambda _: 3)
    monkeypatch.setattr(side_by_side, "run_dvc", lambda *words: asked.append(words[1:]) or 0)
    monkeypatch.setattr(side_by_side, "run_side_by_side", lambda needs, jobs: asked.append(jobs))
    assert CliRunner().invoke(app, ["repro", *words]).exit_code == 0
    assert asked == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_stage_that_fails_after_the_trainings_fails_the_command(project: Path) -> None:
    stages = yaml.safe_load(Path("dvc.yaml").read_text())
    stages["stages"]["report"]["cmd"] = "exit 1"
    Path("dvc.yaml").write_text(yaml.safe_dump(stages))
    assert lgp_repro() not in (0, None)
    assert Path("graft.txt").exists()


# it notices a stop, and that its DVC is gone, as trainings do; then it takes a second to save its state
SAVES = """
import pathlib, sys, time
from lgp.compute.interruption import Interruption
asked = Interruption()
with asked.listening():
    pathlib.Path(sys.argv[1]).touch()
    while not asked.asked():
        time.sleep(0.01)
    time.sleep(1)
    pathlib.Path(sys.argv[1] + "-saved").touch()
sys.exit(130)
"""

# as in a container: what has lost its parent comes to a first process that does not collect those that end
CONTAINER = """
import ctypes, pathlib, signal, subprocess, sys
if sys.platform == "linux":
    PR_SET_CHILD_SUBREAPER = 36
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
signal.signal(signal.SIGINT, lambda *_: None)
command = subprocess.Popen(sys.argv[1:])
pathlib.Path("pid").write_text(str(command.pid))
sys.exit(command.wait())
"""


@pytest.mark.parametrize("many", [True, False])  # several trainings, or the rest in one `dvc repro report`
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_waits_until_trainings_have_saved(number: signal.Signals, many: bool, project: Path) -> None:
    """Ctrl-C goes to the whole group, as from a terminal. SIGTERM goes to the command alone."""
    Path("meets.py").write_text(SAVES)
    words = ["repro", "--jobs", "2" if many else "1"]
    # DVC starts stages by this shell, which stays above them; bash becomes the stage
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHELL": "/bin/sh"}
    with Path("log").open("w") as log:  # a pipe would wait for whatever still holds it
        command = subprocess.Popen(
            [sys.executable, "-c", CONTAINER, sys.executable, "-m", "lgp", *words],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            # as in a terminal, also where these tests run in the background and ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    trained = ["a", "b"] if many else ["b"]  # DVC alone begins with `cl`
    until = time.monotonic() + 120
    while not all(Path(name).exists() for name in trained) and time.monotonic() < until:
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(command.pid, number)
    else:
        os.kill(int(Path("pid").read_text()), number)
    try:
        command.wait(60)
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
    said = Path("log").read_text()
    assert all(Path(f"{name}-saved").exists() for name in trained), said
    assert command.returncode == 128 + number, said
    assert f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}: run the same command again" in said


def test_a_stop_while_dvc_starts_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[str]] = []

    class Stopped(subprocess.Popen[str]):
        def __init__(self, *given: Any, **names: Any) -> None:
            super().__init__(*given, **names)
            begun.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(side_by_side, "dvc", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(subprocess, "Popen", Stopped)
    with pytest.raises(SystemExit), stopped_by_signals():
        side_by_side.run_dvc("repro")
    assert [process.poll() for process in begun] == [-signal.SIGTERM]


def test_a_signal_that_is_ignored_stays_so_in_what_begins(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`nohup lgp repro` goes on when its terminal closes, and so must its DVC."""
    said = "import signal; print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    monkeypatch.setattr(side_by_side, "dvc", lambda *_: [sys.executable, "-c", said])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        side_by_side.run_dvc("repro")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capfd.readouterr().out == "True\n"


def test_lines_of_an_item_of_a_matrix_have_its_name(stages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_side_by_side({"finetune@cl-10pct": set()}, 2)
    assert capsys.readouterr().out.splitlines() == ["[cl-10pct] finetune@cl-10pct works"]
