"""Encoder folders and resume states."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lgp.compute.interruption import Interrupted, Interruption
from lgp.data.labels import LabelledImages
from lgp.errors import LgpError, check_disk_space, is_disk_full
from lgp.models.encoder_folder import load_encoder, save_encoder, save_tensors
from lgp.models.vit import build_encoder, init_encoder_as_mae
from lgp.params.file import Params
from lgp.training import resume_states
from lgp.training.resume_states import EarlierStates, StateStore


@pytest.fixture
def folder(tmp_path: Path, params: Params, prepared: LabelledImages) -> Path:
    encoder = build_encoder(params.model, params.data)
    init_encoder_as_mae(encoder)
    save_encoder(
        tmp_path / "mim" / "encoder", encoder, params.model, params.data, prepared.normalization, {"commit": "abc"}
    )
    return tmp_path / "mim" / "encoder"


def test_plain_timm_gives_our_features(folder: Path, prepared: LabelledImages) -> None:
    images = prepared.normalize(prepared.whole(prepared.ids("test")))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        assert torch.allclose(theirs(images), load_encoder(folder).eval()(images), atol=1e-6)
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] == (1, 8, 8)
    assert list(config["mean"]) == prepared.mean
    assert list(config["std"]) == prepared.std


def test_missing_and_unexpected_tensors_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["surplus"] = tensors.pop("norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LgpError, match=r'Missing key.*"norm\.weight".*Unexpected key.*"surplus"'):
        load_encoder(folder)


def test_absent_encoder_says_which_stage_trains_it(tmp_path: Path) -> None:
    folder = tmp_path / "graft" / "encoder"
    with pytest.raises(LgpError) as error:
        load_encoder(folder)
    assert str(error.value) == f"there is no encoder of arm 'graft' yet (looked in {folder}): run `lgp graft`"


def test_provenance_lies_beside_the_weights(folder: Path) -> None:
    assert json.loads((folder / "provenance.json").read_text()) == {"commit": "abc"}


def newest(store: StateStore) -> dict[str, Any] | None:
    return store.read()


@pytest.mark.parametrize("bytes_of_file", [0, 31, 32, 33, 3 * 2**20])
def test_file_that_is_no_state_is_torn(tmp_path: Path, bytes_of_file: int) -> None:
    store = StateStore(tmp_path, "code")
    store.latest.write_bytes(b"x" * bytes_of_file)
    assert newest(store) is None
    assert not store.latest.exists()


def test_digest_is_of_the_whole_content_however_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path, "code")
    store.save({"w": torch.arange(10_000)})
    content = store.latest.read_bytes()
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]
    for piece in (1000, len(content) - 32, len(content)):
        monkeypatch.setattr(resume_states, "PIECE_BYTES", piece)
        state = newest(store)
        assert state is not None
        assert torch.equal(state["w"], torch.arange(10_000))


def test_what_is_read_lies_in_the_file_and_changes_neither_it_nor_later_states(tmp_path: Path) -> None:
    store = StateStore(tmp_path, "code")
    store.save({"w": torch.ones(10_000)})
    content = store.latest.read_bytes()
    state = newest(store)
    assert state is not None
    assert str(store.latest) in Path("/proc/self/maps").read_text()
    state["w"].fill_(2)
    assert store.latest.read_bytes() == content
    store.save({"w": torch.zeros(10_000)})
    store.save({"w": torch.zeros(10_000)})
    assert state["w"].unique().tolist() == [2]  # its file is gone by now


def test_state_comes_back(tmp_path: Path) -> None:
    store = StateStore(tmp_path, "code")
    assert newest(store) is None
    store.save({"step": 1, "w": torch.ones(2)})
    store.save({"step": 2, "w": torch.ones(2)})
    state = newest(store)
    assert state is not None
    assert state["step"] == 2
    assert torch.equal(state["w"], torch.ones(2))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_torn_state_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    store = StateStore(tmp_path, "code")
    store.save({"step": 1})
    store.save({"step": 2})
    data = bytearray(store.latest.read_bytes())
    data[-100] ^= 1  # of what stands before the digest
    store.latest.write_bytes({"cut": bytes(data[:-50]), "flip": bytes(data), "empty": b""}[damage])
    state = newest(store)
    assert state is not None
    assert state["step"] == 1


def progressed(step: int) -> dict[str, Any]:
    return {"progression": {"step": step, "ended_early": False}, "w": torch.full((1000,), step)}


@pytest.mark.parametrize("then", ["is renamed", "is replaced", "is removed"])
def test_replay_reads_a_state_that_it_opened_whatever_a_training_does_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    store, is_whole = StateStore(tmp_path, "code"), resume_states._is_whole
    for step in (1, 2):
        store.save(progressed(step))

    def checked(path: Path) -> bool:
        whole = is_whole(path)
        if then == "is renamed":
            store.latest.replace(store.previous)
        elif then == "is replaced":
            store.save(progressed(3))
        else:
            store.forget()
        return whole

    monkeypatch.setattr(resume_states, "_is_whole", checked)
    state = EarlierStates(store, 10).read()
    assert state is not None
    assert state["progression"]["step"] == 2
    assert state["w"].unique().tolist() == [2]


def test_replay_takes_the_state_before_where_a_training_just_renames_the_newest(tmp_path: Path) -> None:
    store = StateStore(tmp_path, "code")
    assert EarlierStates(store, 10).read() is None
    store.save(progressed(1))
    store.latest.replace(store.previous)
    state = EarlierStates(store, 10).read()
    assert state is not None
    assert state["progression"]["step"] == 1


def test_torn_state_does_not_take_the_place_of_a_whole_one(tmp_path: Path) -> None:
    store = StateStore(tmp_path, "code")
    store.save({"step": 1})
    store.save({"step": 2})
    store.latest.write_bytes(b"torn")
    assert newest(store) == {"step": 1}
    store.save({"step": 3})
    store.latest.write_bytes(b"torn again")
    assert newest(store) == {"step": 1}


def test_success_leaves_no_half_written_state(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "key", "code")
    store.acquire()
    store.latest.with_suffix(".new").write_bytes(b"half")
    store.close(succeeded=True)
    assert not store.folder.exists()


@pytest.mark.parametrize("where", ["os.fsync", "lgp.training.resume_states._Digesting.write"])
def test_failed_write_leaves_the_state_before(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path, "code")
    store.save({"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, full)
    with pytest.raises(OSError, match="No space"):
        store.save({"step": 2})
    state = newest(store)
    assert state is not None
    assert state["step"] == 1
    assert not list(tmp_path.glob("*.new"))


def test_state_of_other_code_is_kept_but_not_used(tmp_path: Path) -> None:
    old = StateStore(tmp_path, "a" * 64)
    old.save({"step": 1})
    new = StateStore(tmp_path, "b" * 64)
    assert newest(new) is None
    new.save({"step": 2})
    new.forget()
    state = newest(old)
    assert state is not None
    assert state["step"] == 1


def test_state_of_other_code_is_adopted_where_asked_for(tmp_path: Path) -> None:
    new = StateStore(tmp_path, "b" * 64)
    with pytest.raises(LgpError, match="nothing to resume"):
        new.adopt()
    StateStore(tmp_path, "a" * 64).save({"step": 1})
    new.adopt()
    assert newest(new) == {"step": 1}
    assert StateStore(tmp_path, "b" * 64).adopted() == "a" * 16
    new.save({"step": 2})
    new.adopt()
    assert newest(new) == {"step": 2}
    new.forget()
    assert new.adopted() is None


def _hold(folder: Path, ready: "multiprocessing.synchronize.Event", done: "multiprocessing.synchronize.Event") -> None:
    store = StateStore(folder, "code")
    store.acquire()
    ready.set()
    done.wait(60)


def test_second_trainer_is_refused_with_the_first_ones_id(tmp_path: Path) -> None:
    folder = tmp_path / "mim-pretrain" / "parameters"
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    first = context.Process(target=_hold, args=(folder, ready, done))
    first.start()
    assert ready.wait(60)
    try:
        with pytest.raises(LgpError, match=f"process {first.pid} is training the same thing"):
            StateStore(tmp_path / "mim-pretrain" / "other-parameters", "code").acquire()
    finally:
        done.set()
        first.join()
    StateStore(folder, "code").acquire()


def test_same_training_in_another_folder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experiments of DVC's queue run in copies of the project, and share the states of the project."""
    folder, seen, said = tmp_path / "mim-pretrain" / "parameters", list[bool](), list[str]()
    # what a thread prints while pytest empties its own record of the output is lost
    monkeypatch.setattr(resume_states, "print", lambda line, **_: said.append(line), raising=False)
    first = StateStore(folder, "code")
    first.acquire()
    monkeypatch.chdir(tmp_path)
    second = StateStore(folder, "code")

    def train() -> None:
        second.acquire(waits=True)
        seen.append(folder.is_dir())
        second.close(succeeded=True)

    waiting = threading.Thread(target=train)
    waiting.start()
    while not said and waiting.is_alive():
        time.sleep(0.01)
    assert said == [
        f"mim-pretrain: process {os.getpid()} is training the same thing in another folder: waiting for its end"
    ]
    assert not seen
    first.close(succeeded=True)  # it removes the folder
    waiting.join(30)
    assert seen == [True]


def test_wait_ends_with_what_started_it(tmp_path: Path) -> None:
    """As where DVC is killed. Its command is told by a variable, and prints whom it waits for."""
    folder = tmp_path / "mim-pretrain" / "parameters"
    first = StateStore(folder, "code")
    first.acquire()
    wait = (
        "from pathlib import Path; from lgp.training.resume_states import StateStore; "
        f"StateStore(Path({str(folder)!r}), 'code').acquire(waits=True)"
    )
    start = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {wait!r}], env={{**os.environ, 'DVC_STAGE': 'mim'}})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("DVC_STAGE", None)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    dvc = subprocess.Popen([sys.executable, "-c", start], cwd=tmp_path, env=environment, **pipe)
    assert dvc.stdout is not None
    with dvc, ThreadPoolExecutor(1) as reader:
        assert "waiting for its end" in dvc.stdout.readline()
        dvc.kill()
        said = reader.submit(dvc.stdout.read)  # to its end: the command that waited has ended too
        try:
            assert "mim-pretrain: stopped while it waited (DVC, which started it, is gone)" in said.result(30)
        finally:
            first.close(succeeded=False)  # a wait that goes on is over


def test_who_stopped_waiting_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mim-pretrain" / "parameters"
    first = StateStore(folder, "code")
    first.acquire()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Interruption, "asked", lambda _: True)
    stopped = StateStore(folder, "code")
    with pytest.raises(Interrupted, match="mim-pretrain: stopped while it waited") as error:
        stopped.acquire(waits=True)
    assert error.value.exit_code == 143
    other = StateStore(tmp_path / "mim-pretrain" / "other-parameters", "code")
    other.acquire()  # the lock of this folder is free
    other.close(succeeded=False)
    first.close(succeeded=False)


def test_who_does_not_wait_is_refused_and_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mim-pretrain" / "parameters"
    first = StateStore(folder, "code")
    first.acquire()
    monkeypatch.chdir(tmp_path)
    refused = StateStore(folder, "code")  # a lock that nothing names any more is released
    with pytest.raises(LgpError, match=f"process {os.getpid()} is training the same thing"):
        refused.acquire()
    other = StateStore(tmp_path / "mim-pretrain" / "other-parameters", "code")
    other.acquire()  # the refused one has left the lock of this folder
    other.close(succeeded=False)
    first.close(succeeded=False)


def test_second_training_in_the_same_folder_is_refused_also_where_it_would_wait(tmp_path: Path) -> None:
    folder = tmp_path / "mim-pretrain" / "parameters"
    first = StateStore(folder, "code")
    first.acquire()
    with pytest.raises(LgpError, match="is training the same thing"):
        StateStore(folder, "code").acquire(waits=True)
    first.close(succeeded=False)


def test_failed_stage_keeps_states_and_removes_what_is_of_no_use(tmp_path: Path) -> None:
    old, new = (StateStore(tmp_path / "key", code * 64) for code in "ab")
    old.save({"step": 1})
    new.acquire()
    new.run_id_file.write_text("x")
    new.close(succeeded=False)
    assert old.has_state()
    assert not new.run_id_file.exists()
    old.acquire()
    old.close(succeeded=False)
    assert old.has_state()
    old.acquire()
    old.close(succeeded=True)
    assert not old.folder.exists()


def test_damaged_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(LgpError, match=r"model\.safetensors is damaged"):
        load_encoder(folder)


def test_full_disk_while_writing_weights_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lgp.models.encoder_folder.save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        save_tensors({}, tmp_path / "x.safetensors")
    assert is_disk_full(error.value)


def test_full_disk_is_told_before_any_work(tmp_path: Path) -> None:
    check_disk_space(tmp_path, 1)
    with pytest.raises(LgpError, match=r"disk full: .* MiB free, this needs about 1073741824 MiB"):
        check_disk_space(tmp_path, 2**50)
