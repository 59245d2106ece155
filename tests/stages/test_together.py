"""Evaluations that DVC asks for one after another are computed together. Each stage takes its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from multiprocessing.context import ForkProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, merged
from typer.testing import CliRunner

import stages.together as module
from cli import app
from lgp.compute.interruption import ASKING, stopped_by_signals
from lgp.compute.liveness import lives
from lgp.data.labels import LabelledImages
from lgp.params.file import load_params
from lgp.workflow.ahead import AHEAD, finish
from lgp.workflow.code_digest import code_digests
from stages.options import DEFAULT_PARAMS
from stages.together import Call

TASKS = ("linear", "fewshot-1pct", "propagate-1pct", "selected-1pct", "selected-1pct-propagated")
# labels of 3shot are not there yet, so that one of the commands fails
LISTS = {
    "arms": ["mim"],
    "finetuned_arms": ["mim"],
    "few_labels": ["1pct", "3shot"],
    "propagated": ["1pct"],
    "labels": {"shots": [3]},
}


def lgp(*words: str) -> str:
    ran = CliRunner().invoke(app, list(words))
    assert ran.exit_code == 0, ran.output
    return ran.output


def start(*words: str) -> subprocess.Popen[str]:
    """Start a command as DVC does. A fork of the tests' own process would inherit its threads."""
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    env = os.environ | {"DVC_STAGE": "linear@mim", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outputs() -> dict[str, bytes]:
    """Return the bytes of all metrics, predictions and classifiers, but for notes of when and how they were made."""
    folders = (Path("metrics"), Path("predictions"), Path("models/mim/classifiers"))
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {str(file): file.read_bytes() for file in files if file.name not in ("provenance.json", "seal.json")}


@pytest.fixture
def project(mim_project: Path, values: dict[str, Any], prepared: LabelledImages) -> Path:
    (mim_project / "params.yaml").write_text(yaml.safe_dump(merged(values, LISTS)))
    shutil.copytree(prepared._labels_folder.parent, "data")
    return mim_project


def waiting() -> list[str]:
    return sorted(path.name.removeprefix("mim-") for path in AHEAD.iterdir()) if AHEAD.exists() else []


@pytest.fixture
def another_disk() -> Iterator[str]:
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with TemporaryDirectory(dir=shared) as folder:
        yield folder


def test_what_is_computed_together_is_what_each_stage_computes_alone(
    project: Path, another_disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [["linear", "mim"], *([name, "mim", "1pct"] for name in ("fewshot", "propagate", "selected"))]
    said = [lgp(*call) for call in calls]
    alone = outputs()
    assert waiting() == []
    for place in ("predictions", "models/mim/classifiers"):
        shutil.rmtree(place)
    for task in TASKS[1:]:  # what is there belongs to other stages, which may not be asked for
        Path(f"metrics/mim-{task}.json").write_text("old")
    Path("predictions").symlink_to(another_disk, target_is_directory=True)

    first = start("linear", "mim")
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0, output
    assert output.startswith("5 evaluations are computed together")
    assert output.endswith(said[0])
    assert waiting() == sorted(TASKS[1:])
    assert {Path(f"metrics/mim-{task}.json").read_text() for task in TASKS[1:]} == {"old"}

    monkeypatch.setenv("DVC_STAGE", "fewshot@mim-1pct")
    monkeypatch.setattr(module, "_compute", None)  # nothing is computed any more
    for call, before in zip(calls[1:], said[1:], strict=True):
        assert lgp(*call) == before
    assert waiting() == []
    assert outputs() == alone
    for task in TASKS:
        made = json.loads(Path(f"models/mim/classifiers/{task}/provenance.json").read_text())
        assert (made["arm"], made["task"]) == ("mim", task)


def test_outputs_of_other_parameters_or_that_are_not_wanted_are_not_taken(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Call("fewshot", "mim", "1pct")
    computed = lgp(*call.words)
    monkeypatch.setenv("DVC_STAGE", "fewshot@mim-1pct")
    code = code_digests(Path())

    def wait_again(code: Mapping[str, str] = code) -> None:
        [spec] = call.specs()
        place = AHEAD / "mim-fewshot-1pct"
        place.mkdir(parents=True)
        for path in spec.writes:
            path.rename(place / path.name)
        finish(call.specs(), "as before\n", code)

    monkeypatch.setattr(module, "_others", lambda *_: [])
    wait_again()
    assert lgp(*call.words) == "as before\n"
    wait_again()
    assert lgp(*call.words, "--fresh") == computed
    assert waiting() == []
    wait_again()
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("folds: 5", "folds: 4"))
    assert lgp(*call.words) != "as before\n"
    Path("params.yaml").write_text(text)
    assert lgp(*call.words) == "as before\n"
    wait_again(code={"fewshot": "of an edit while it ran"})
    assert waiting() == []
    assert lgp(*call.words) == computed
    wait_again()
    damaged = AHEAD / "mim-fewshot-1pct" / "fewshot-1pct" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert lgp(*call.words) == computed


def test_outputs_are_compared_with_the_code_of_before_it_was_loaded(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, given = {"linear": "loaded"}, []
    monkeypatch.setattr("lgp.workflow.code_digest.code_digests", lambda _root: dict(code))
    monkeypatch.setattr(module, "import_module", lambda _name: code.update(linear="edited"))
    monkeypatch.setattr("lgp.workflow.mlflow_store.load", lambda: None)
    monkeypatch.setattr(module, "_command", lambda words, log, _: log.write_text(" ".join(words)))
    monkeypatch.setattr("lgp.workflow.ahead.finish", lambda _specs, said, of: given.append((said, of)))
    module._compute([Call("linear", "mim")], DEFAULT_PARAMS)
    assert given == [("linear mim", {"linear": "loaded"})]


def test_commands_are_computed_together_only_where_that_pays(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call("linear", "mim")
    others = [Call("fewshot", "mim", n) for n in ("1pct", "3shot")]
    others += [Call(name, "mim", "1pct") for name in ("propagate", "selected")]
    assert module._others(call, DEFAULT_PARAMS) == others
    lgp(*others[0].words)
    assert module._others(call, DEFAULT_PARAMS) == others[1:]
    monkeypatch.setattr(module, "MOST_IMAGES", 10)
    assert module._others(call, DEFAULT_PARAMS) == []
    monkeypatch.undo()
    monkeypatch.chdir(project)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert module._others(call, DEFAULT_PARAMS) == others[1:]  # run.device is cpu
    assert module._on_cuda(load_params(ROOT / "params.yaml"))


@pytest.mark.parametrize(
    ("words", "one"),
    [
        (["/opt/me@work/bin/dvc", "repro"], False),
        (["dvc", "repro", "report"], False),
        (["dvc", "repro", "linear@mim"], True),
        (["dvc", "repro", "dvc.yaml:fewshot"], True),
        (["dvc", "exp", "run", "linear@mim"], True),
    ],
)
def test_a_stage_that_is_asked_for_by_name_computes_no_other(
    words: list[str], one: bool, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Above:
        def cmdline(self) -> list[str]:
            return words

    monkeypatch.setattr(psutil.Process, "parents", lambda _self: [Above()])
    assert (module._others(Call("linear", "mim"), DEFAULT_PARAMS) == []) == one


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("where", ["above", "fork"])
def test_a_stop_while_a_fork_starts_ends_it_before_its_folder_is_gone(
    where: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal reaches another thread, or a fork that has not begun its command."""
    monkeypatch.setenv("DVC_STAGE", "linear@mim")
    start, forks = ForkProcess.start, list[ForkProcess]()
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        thread = pool.submit(threading.get_ident).result()

        def asked_to_stop(fork: ForkProcess) -> None:
            start(fork)
            forks.append(fork)
            if where == "above":
                signal.pthread_kill(thread, signal.SIGTERM)
            else:
                os.kill(fork.pid or 0, signal.SIGTERM)
            time.sleep(0.1)  # until it is there

        monkeypatch.setattr(ForkProcess, "start", asked_to_stop)
        monkeypatch.setattr(module, "_command", late(module._command))
        monkeypatch.setattr(module, "import_module", lambda _: SimpleNamespace(app=lambda *_, **__: None))
        # pytest's stderr writes past the descriptor that a fork redirects to its log
        monkeypatch.setattr(sys, "stderr", stack.enter_context(open(2, "w", closefd=False)))
        with pytest.raises(SystemExit) if where == "above" else nullcontext(), stopped_by_signals():
            module._run([Call("linear", "mim")], 1, project, {})
    assert [fork.exitcode for fork in forks] == [1]
    assert "Interrupted: stopped by SIGTERM" in Path("linear-mim").read_text()
    assert Path("masked").read_text() == "True"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert outputs() == {}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_leaves_ctrl_c_of_the_terminal_to_the_process_above(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def app(*_: Any, **__: Any) -> None:
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        Path("hears").write_text(f"{signal.getsignal(signal.SIGINT) is signal.SIG_IGN} {masked or 'all others'}")

    monkeypatch.setenv("DVC_STAGE", "linear@mim")
    monkeypatch.setattr(module, "import_module", lambda _: SimpleNamespace(app=app))
    monkeypatch.setattr("lgp.workflow.ahead.finish", lambda *_: None)
    module._run([Call("linear", "mim")], 1, project, {})
    assert Path("hears").read_text() == "True all others"


def late(command: Callable[..., None]) -> Callable[..., None]:
    def later(*given: Any) -> None:
        Path("masked").write_text(str(set(ASKING) <= set(signal.pthread_sigmask(signal.SIG_BLOCK, []))))
        time.sleep(0.3)  # the signal comes before the command takes any
        command(*given)

    return later


def test_a_stop_ends_all_of_them_and_leaves_nothing(project: Path) -> None:
    first = start("linear", "mim")
    assert first.stdout is not None
    assert "computed together" in first.stdout.readline()
    while not (forks := psutil.Process(first.pid).children(recursive=True)):
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert (first.returncode, output.count("\n")) == (128 + signal.SIGTERM, 1), output
    assert "stopped by SIGTERM" in output
    assert not any(lives(fork) for fork in forks)
    assert outputs() == {}
    assert waiting() == []
