"""States that are copied, and written in a thread."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lgp.compute.nested import copied, with_tensors
from lgp.training.left_states import unused
from lgp.training.optimizer import adamw
from lgp.training.resume_states import StateStore
from lgp.training.saving import BackgroundSaver, snapshot

WIDTH = 6


def trained(steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """A model with buffers and two layouts after some steps, and its state as the loop saves it.

    One module has two names, as the encoder of `joint` has.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, WIDTH, 2), nn.Flatten(), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3))
    model[0].to(memory_format=torch.channels_last)
    model[1].register_module("again", model[3])
    groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.0} for p in model.parameters()]
    optimizer = adamw(groups, (0.9, 0.95))
    for _ in range(steps):
        step(model, optimizer)
    history = [{"epoch": 1.0, "train/loss": 0.5}]
    return model, optimizer, {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progression": {"step": steps, "history": history, "again": history},
    }  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(5, 2, 2, 2)).square().mean().backward()
    optimizer.step()


def test_file_of_a_snapshot_is_that_of_the_state(tmp_path: Path) -> None:
    _, _, state = trained()
    live, copy = (StateStore(tmp_path / name, "code") for name in ("live", "copy"))
    live.save(state)
    copy.save(snapshot(state))
    assert copy.latest.read_bytes() == live.latest.read_bytes()


def test_snapshot_shares_what_the_state_shares() -> None:
    whole = torch.arange(6.0)
    state = {"whole": whole, "again": whole[:], "part": whole[2:4], "other": whole.clone(), "none": torch.empty(0)}
    copy = snapshot(state)
    for name, tensor in state.items():
        assert torch.equal(copy[name], tensor), name
    copy["whole"][2] = 9.0
    assert [copy[name].max().item() for name in ("again", "part", "other")] == [9.0, 9.0, 5.0]
    assert whole.tolist() == [0, 1, 2, 3, 4, 5]


def test_no_later_step_changes_a_snapshot(tmp_path: Path) -> None:
    model, optimizer, state = trained()
    store = StateStore(tmp_path, "code")
    store.save(state)
    before, copy = store.latest.read_bytes(), snapshot(state)
    step(model, optimizer)
    state["progression"]["step"] = 3
    state["progression"]["history"].append({"epoch": 2.0})
    state["progression"]["history"][0]["epoch"] = 9.0
    store.save(copy)
    assert store.latest.read_bytes() == before
    store.save(state)
    assert store.latest.read_bytes() != before


def test_copies_keep_classes_attributes_and_the_place_of_single_numbers() -> None:
    _, _, state = trained()
    copy = copied(state, torch.device("meta"))
    assert type(copy["model"]) is type(state["model"])
    assert copy["model"]._metadata == state["model"]._metadata
    for name, tensor in state["model"].items():
        assert copy["model"][name].device.type == ("meta" if tensor.ndim else "cpu"), name
    assert copy["optimizer"]["state"][0]["step"].item() == 2
    assert copy["optimizer"]["state"][0]["step"] is not state["optimizer"]["state"][0]["step"]
    assert with_tensors({"a": [torch.ones(1), (1, 2)], "b": None}, lambda t: t + 1) == {"a": [2, (1, 2)], "b": None}


class Held:
    """Stands for a store whose writing takes as long as it is held."""

    def __init__(self) -> None:
        self.go, self.states, self.threads = threading.Event(), list[Any](), list[str]()
        self.failure: BaseException | None = None

    def save(self, state: Any) -> None:
        assert self.go.wait(60)
        self.threads.append(threading.current_thread().name)
        if self.failure is not None:
            raise self.failure
        self.states.append(state)


def test_state_is_written_in_a_thread_and_its_end_is_told_once() -> None:
    store = Held()
    saver = BackgroundSaver(store)  # type: ignore[arg-type]
    assert not saver.is_busy
    assert saver.settled() is False
    saver.save({"step": 1})
    assert saver.is_busy
    assert not store.states
    store.go.set()
    assert [saver.settled(), saver.settled()] == [True, False]
    assert (store.states, store.threads, saver.is_busy) == ([{"step": 1}], ["saving"], False)
    store.failure = OSError(28, "full")
    saver.save({"step": 2})
    saver.wait()
    with pytest.raises(OSError, match="full"):
        saver.settled()
    store.failure = None
    assert saver.settled() is False
    saver.save({"step": 3})
    assert saver.settled() is True


def test_time_of_copying_and_writing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    store, times = Held(), iter((10.0, 13.0))
    store.go.set()
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    saver = BackgroundSaver(store)  # type: ignore[arg-type]
    saver.save({})
    saver.wait()
    assert saver.took == 3.0


def test_kill_in_the_middle_of_a_write_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, torn, go = StateStore(tmp_path, "code"), threading.Event(), threading.Event()
    store.save({"step": 1, "w": torch.ones(1000)})

    def fsync(_: int) -> None:
        torn.set()
        assert go.wait(60)

    saver = BackgroundSaver(store)
    monkeypatch.setattr("os.fsync", fsync)
    saver.save({"step": 2, "w": torch.ones(1000)})
    assert torn.wait(60)
    state = StateStore(tmp_path, "code").read()  # what the next process would find
    assert state is not None
    assert state["step"] == 1
    go.set()
    assert saver.settled()
    state = StateStore(tmp_path, "code").read()
    assert state is not None
    assert state["step"] == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take SIGINT as Python does, also in a process that ignores it: in the background, or beside other tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("of_part", [False, True])
def test_locks_are_held_until_the_state_is_written_however_often_a_stop_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_part: bool
) -> None:
    store, go = StateStore(tmp_path / "key", "code"), threading.Event()
    store.acquire()
    store.run_id_file.write_text("of the run to go on with")
    writer = store.part("0.001") if of_part else store
    monkeypatch.setattr("os.fsync", lambda _: go.wait(60))
    saver = BackgroundSaver(writer)
    saver.save({"step": 1})

    def close_and_stop() -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        store.close(succeeded=False)
        threading.Event().wait(30)  # for the stop, where nothing was waited for

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            close_and_stop()
    with unused(store.folder) as free:
        assert not free
    threading.Timer(0.2, go.set).start()
    store.close(succeeded=False)
    assert writer.latest.exists()
    assert store.run_id_file.exists()
    with unused(store.folder) as free:
        assert free
    assert saver.settled()
