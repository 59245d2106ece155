"""The training loop: reproducible, resumable, and stopping where it must."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lgp.compute.device import choose_device
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch
from lgp.errors import LgpError
from lgp.params.file import Params
from lgp.params.run import RunParams
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.mim import pretrain_mim
from lgp.training.loop import Trainer
from lgp.training.resume_states import StateStore

PRETRAIN = {"mim": pretrain_mim, "cl": pretrain_cl}


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def log_epoch(self, values: dict[str, float]) -> None:
        """Keep the values."""
        self.epochs.append(values)


def bytes_of(result: Pretrained) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in result.model.state_dict().items()}


class StopError(Exception):
    """What a test raises to interrupt a training."""


@pytest.mark.parametrize("arm", ["mim", "cl"])
def test_two_runs_are_bitwise_equal_and_another_seed_differs(
    arm: str, tmp_path: Path, prepared: LabelledImages, params: Params
) -> None:
    results = [
        bytes_of(PRETRAIN[arm](Session(prepared, p, StateStore(tmp_path / str(i), "code"), Notes())))
        for i, p in enumerate([params, params, params.model_copy(update={"seed": 1})])
    ]
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.parametrize("arm", ["mim", "cl"])
@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_resumed_equals_uninterrupted(
    arm: str, stop_at: int, tmp_path: Path, prepared: LabelledImages, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    whole = PRETRAIN[arm](Session(prepared, params, StateStore(tmp_path / "whole", "code"), notes))
    always = params.model_copy(update={"run": params.run.model_copy(update={"save_every_s": 1e-9})})
    monkeypatch.setattr("lgp.training.loop.SAVE_SHARE", math.inf)
    step = Trainer._step

    def interrupted(self: Trainer, batch: Any, total: int) -> None:
        if self.now.step == stop_at:
            raise StopError
        step(self, batch, total)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(StopError):
            PRETRAIN[arm](Session(prepared, always, StateStore(tmp_path / "state", "code"), Notes()))
    resumed_notes = Notes()
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "_step", lambda self, b, t: (steps.append(self.now.step), step(self, b, t))[1])
    resumed = PRETRAIN[arm](Session(prepared, params, StateStore(tmp_path / "state", "code"), resumed_notes))
    assert steps[0] == stop_at
    assert bytes_of(resumed) == bytes_of(whole)
    assert resumed_notes.epochs == notes.epochs == whole.progression.history
    assert resumed.progression.train_flops == whole.progression.train_flops > 0


def test_loss_falls(tmp_path: Path, prepared: LabelledImages, params: Params) -> None:
    longer = params.model_copy(update={"mim": params.mim.model_copy(update={"epochs": 8})})
    history = pretrain_mim(Session(prepared, longer, StateStore(tmp_path, "code"), Notes())).progression.history
    assert [h["epoch"] for h in history] == list(range(1, 9))
    assert history[-1]["train/loss"] < 0.9 * history[0]["train/loss"]


def test_loss_that_is_not_finite_stops_with_step_and_rate_and_keeps_the_last_good_state(
    tmp_path: Path, prepared: LabelledImages, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Trainer._backward

    def poisoned(self: Trainer, batch: Batch) -> Any:
        loss = backward(self, batch)
        return loss * float("nan") if batch.step == 4 else loss

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    store = StateStore(tmp_path, "code")
    with pytest.raises(LgpError, match=r"mim: the loss is nan at step 4, learning rate [\d.e-]+: lower") as error:
        pretrain_mim(Session(prepared, params, store, Notes()))
    assert str(tmp_path) in str(error.value)
    payload = store.read()
    assert payload is not None
    state = StateStore.decode(payload)
    assert state["progression"]["step"] == 3
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, prepared: LabelledImages, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def poisoned(self: Trainer, batch: Any, total: int) -> None:
        step(self, batch, total)
        if self.now.step == 6:  # the last step: no loss will be computed with these weights
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("inf"))

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(LgpError, match="a weight stopped being finite by step 6"):
        pretrain_mim(Session(prepared, params, StateStore(tmp_path, "code"), Notes()))


def test_full_disk_while_saving_does_not_stop_training(
    tmp_path: Path,
    prepared: LabelledImages,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = StateStore(tmp_path, "code")

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "save", full)
    assert pretrain_mim(Session(prepared, params, store, Notes())).progression.step == 6
    assert "disk full" in capsys.readouterr().out


def test_progress_lines_name_epoch_loss_speed_and_time_left(
    tmp_path: Path, prepared: LabelledImages, params: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    chatty = params.model_copy(update={"run": params.run.model_copy(update={"print_every_s": 0})})
    pretrain_mim(Session(prepared, chatty, StateStore(tmp_path, "code"), Notes()))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("mim: epoch 2/2  loss ")
    assert "images/s  left 0:00" in last


def test_absent_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(RunParams()).type == "cpu"
    with pytest.raises(LgpError, match=r"run\.device is cuda, but torch finds no CUDA device"):
        choose_device(RunParams(device="cuda"))
