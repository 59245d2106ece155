"""Whole trainings: repeated and resumed to the bit, and learning."""

import math
from pathlib import Path
from typing import Any

import pytest
from test_loop import Notes

from lgp.data.labels import LabelledImages
from lgp.params.file import Params
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.mim import pretrain_mim
from lgp.training.loop import Trainer
from lgp.training.resume_states import StateStore

PRETRAIN = {"mim": pretrain_mim, "cl": pretrain_cl}


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
    monkeypatch.setattr("lgp.training.saving.BackgroundSaver.is_busy", False)  # so each state is waited for
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
