"""Trainings that are killed, told to stop or left alone go on to the same bytes."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, SMALL, merged
from safetensors.torch import load
from torch import Tensor

from lgp.compute.interruption import Interruption
from lgp.compute.liveness import lives

EPOCHS = 60
COMMAND = [sys.executable, str(ROOT / "cli.py")]


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "DVC_STAGE")}
    return {**kept, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


def write(folder: Path, changes: dict[str, Any] | None = None, **run: Any) -> None:
    values = merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL)
    values = merged(values, {"graft": {"epochs": EPOCHS}, "run": {"save_every_s": 1e-3, **run}})
    (folder / "params.yaml").write_text(yaml.safe_dump(merged(values, changes or {})))


def start(folder: Path) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*COMMAND, "graft"],
        cwd=folder,
        env=environment(),
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(condition: Callable[[], Any], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    """Wait for something that a process does, and fail if it ends before."""
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    pytest.fail("nothing happened")


def states(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in (folder / ".lgp" / "resume").glob("graft-pretrain/*/state-*"):
        try:
            found.add((path.name, path.stat().st_mtime_ns))
        except FileNotFoundError:
            continue
    return found


def start_and_wait(folder: Path) -> "subprocess.Popen[str]":
    """Start the graft and wait until it has saved a state."""
    before = states(folder)
    process = start(folder)
    until(lambda: any(name.endswith(".pt") for name, _ in states(folder) - before), process)
    return process


def encoder(folder: Path) -> bytes:
    return (folder / "models" / "graft" / "encoder" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages before the graft have run."""
    folder = tmp_path_factory.mktemp("project")
    write(folder)
    for stage in ("prepare", "labels", "mim"):
        subprocess.run([*COMMAND, stage], cwd=folder, env=environment(), check=True)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    """The encoder of an uninterrupted graft."""
    subprocess.run([*COMMAND, "graft"], cwd=folder, env=environment(), check=True)
    return encoder(folder)


@pytest.fixture(autouse=True)
def _clean(folder: Path) -> Iterator[None]:
    yield
    for path in folder.glob("*.lock"):
        path.unlink()
    write(folder)


def finish(folder: Path, *options: str) -> str:
    result = subprocess.run(
        [*COMMAND, "graft", *options], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_killed_at_random_moments_also_while_saving_ends_in_the_same_bytes(folder: Path, whole: bytes) -> None:
    rng = random.Random(0)
    for in_save in (False, True, True):
        process = start_and_wait(folder)
        if in_save:
            until(lambda: any(name.endswith(".new") for name, _ in states(folder)), process)
        else:
            time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
    assert "going on from step" in finish(folder)
    assert encoder(folder) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_says_so_and_goes_on_to_the_same_bytes(
    number: signal.Signals, folder: Path, whole: bytes
) -> None:
    write(folder, workers=2)
    process = start_and_wait(folder)
    os.killpg(process.pid, number)  # as a terminal and a scheduler do: the reading processes get it too
    output = process.communicate()[0]
    assert process.returncode == 128 + number
    step = output.split("stopped at step ")[1].split()[0]
    assert f"({number.name}), its state is saved: run the same command again" in output
    assert f"going on from step {step}" in finish(folder)
    assert encoder(folder) == whole


def test_a_state_of_other_code_is_used_only_where_asked_for(folder: Path, whole: bytes) -> None:
    process = start_and_wait(folder)
    process.kill()
    process.communicate()
    for path in (folder / ".lgp" / "resume").glob("graft-pretrain/*/state-*.pt"):
        path.unlink() if "previous" in path.name else path.rename(path.with_name(f"state-{'0' * 16}.pt"))
    left, kept = folder / ".lgp" / "resume", folder / "kept"
    shutil.copytree(left, kept)
    said = finish(folder)
    assert "going on" not in said
    assert "finished: the resume state that other code wrote of this training is removed" in said
    assert not list(left.rglob("state-*"))
    shutil.copytree(kept, left, dirs_exist_ok=True)
    assert "going on from step" in finish(folder, "--resume")
    provenance = json.loads((folder / "models" / "graft" / "encoder" / "provenance.json").read_text())
    assert provenance["resumed_from_code"] == "0" * 16
    assert encoder(folder) == whole


def test_a_lost_process_takes_the_others_down_and_one_alone_goes_on(folder: Path) -> None:
    write(folder, processes=2)
    process = start_and_wait(folder)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(max(int(pid) for pid in children.stdout.split()), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert (
        "ended with SIGKILL, perhaps as memory ran out, the others were stopped: run the same command again" in output
    )
    write(folder)
    assert "going on from step" in finish(folder)


def test_one_process_goes_on_as_two(folder: Path) -> None:
    # short and at the paper's rate: contrastive learning is chaotic, any other order of summation grows
    papers = {"graft": {"epochs": 20, "stage_lr": {"base_lrs": [1.5e-4, 1.5e-4, 1.5e-4]}}}
    write(folder, papers)
    finish(folder)
    alone_losses, alone = outcome(folder)
    process = start_and_wait(folder)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    write(folder, papers, processes=2)
    assert "going on from step" in finish(folder)
    losses, weights = outcome(folder)
    assert losses == pytest.approx(alone_losses, rel=1e-5)
    # but for rounding the gradient of a key's bias is zero (softmax), and that of the last norm's bias (BatchNorm):
    # AdamW makes steps of the rounding, which no loss feels
    farthest = {
        n: (weights[n] - alone[n]).abs().max().item() for n in alone if not n.endswith(("qkv.bias", "norm.bias"))
    }
    assert max(farthest.values()) < 1e-5, farthest


def outcome(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loss of each epoch, and the encoder's weights."""
    with (folder / "models" / "graft" / "curves.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file)]
    return losses, load(encoder(folder))


def running_in(session: int) -> list[psutil.Process]:
    """Return what runs in a session, without those that ended and that nobody collects, as in some containers."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == session and lives(process):
                found.append(process)
    return found


def test_a_trainer_stops_when_dvc_dies(folder: Path) -> None:
    # a shell lies between DVC and its command
    command = f"{sys.executable} {COMMAND[1]} graft; true"
    parent = (
        f"import os, subprocess; subprocess.run({command!r}, shell=True, env={{**os.environ, 'DVC_STAGE': 'graft'}})"
    )
    values = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump(merged(values, {"graft": {"epochs": 100_000}})))
    before = states(folder)
    log = (folder / "dvc.log").open("w+")
    dvc = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=folder, env=environment(), stdout=log, stderr=log, start_new_session=True
    )
    try:
        until(lambda: states(folder) - before, dvc)  # type: ignore[arg-type]
        dvc.kill()
        dvc.wait()
        for _ in range(300):
            left = running_in(dvc.pid)
            if not left:
                break
            time.sleep(0.1)
        assert not left
        log.seek(0)
        assert "(DVC, which started it, is gone), its state is saved" in log.read()
    finally:
        log.close()
        subprocess.run(["pkill", "-KILL", "-s", str(dvc.pid)], check=False)


def test_second_ctrl_c_stops_without_saving_as_the_first_says(capsys: pytest.CaptureFixture[str]) -> None:
    interruption = Interruption()
    before = signal.getsignal(signal.SIGINT)
    with interruption.listening():
        assert not interruption.asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.asked()
        assert capsys.readouterr().err == (
            "stopping after this step to save the state; press Ctrl-C again to stop without saving\n"
        )
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_started_the_process_stays_known_where_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that waits for another one begins to train after that."""
    before = Interruption()
    monkeypatch.setattr("psutil.Process.parents", lambda _: pytest.fail("looked up again"))
    monkeypatch.setenv("DVC_STAGE", "mim")
    assert Interruption()._parents == before._parents
