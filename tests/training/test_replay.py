"""A replay repeats a step of a training, says what was seen, and leaves everything as it was."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Silent, merged
from torch import Tensor

from lgp.compute.interruption import Interrupted, Interruption
from lgp.data.labels import LabelledImages
from lgp.data.normalization import Normalization
from lgp.data.storage import Images
from lgp.errors import Diverged, LgpError
from lgp.params.file import Params
from lgp.pretrain.arm import Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.graft import pretrain_graft
from lgp.pretrain.mim import pretrain_mim
from lgp.training.loop import Trainer
from lgp.training.replay import Replay, Replayed, Seen
from lgp.training.resume_states import StateStore

STEPS = 6  # of the small mim: 2 epochs of 3 steps


class Deaf:
    """An observer that must not be told anything."""

    def log_epoch(self, values: dict[str, float]) -> None:
        """Fail."""
        raise AssertionError(values)


def replayed(prepared: LabelledImages, params: Params, folder: Path, step: int, steps: int = STEPS) -> Seen:
    """Return what a replay of mim's step sees. The resume states are in `folder`."""
    session = Session(prepared, params, StateStore(folder, "code"), Deaf(), fit=Replay("mim", step, steps).fit)
    with pytest.raises(Replayed) as ended:
        pretrain_mim(session)
    return ended.value.seen


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of change of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def changed(values: dict[str, Any], **mim: Any) -> Params:
    return Params.model_validate(merged(values, {"mim": mim}))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Loss and norm of all gradients of each step of every training, before they are clipped."""
    seen: list[tuple[float, float]] = []
    backward = Trainer._backward

    def noting(trainer: Trainer, batch: Any) -> Tensor:
        loss = backward(trainer, batch)
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        seen.append((loss.item(), torch.cat(gradients).double().norm().item()))
        return loss

    monkeypatch.setattr(Trainer, "_backward", noting)
    return seen


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_replayed_step_is_that_of_the_training(
    tmp_path: Path,
    values: dict[str, Any],
    prepared: LabelledImages,
    watched: list[tuple[float, float]],
    clip_norm: float | None,
) -> None:
    params = changed(values, clip_norm=clip_norm)
    trainers: list[Trainer] = []
    fit = lambda trainer: trainers.append(trainer) or trainer.fit()  # type: ignore[func-returns-value]  # noqa: E731
    pretrain_mim(Session(prepared, params, StateStore(tmp_path / "a", "code"), Silent(), fit=fit))
    loss, norm = watched[4]
    seen = replayed(prepared, params, tmp_path / "none", 4)
    assert seen.loss == loss
    assert seen.grad_norm == pytest.approx(norm)
    assert (seen.training, seen.step) == ("mim", 4)
    ids = trainers[0].crops.ids_of(4).tolist()
    assert seen.images == [(i, prepared.paths[i]) for i in ids]
    # step 4 is the second after a warm-up of 3: half a cosine over the 3 steps that are left
    assert seen.rate == pytest.approx(params.mim.base_lr * 64 / 256 * (1 + math.cos(math.pi / 3)) / 2)
    norms = list(seen.grad_norms.values())
    assert norms == sorted(norms, reverse=True)
    assert math.hypot(*norms) == pytest.approx(norm)
    assert "encoder.blocks.0.attn.qkv.weight" in seen.grad_norms
    assert (seen.inputs_finite, seen.bad_weight, seen.bad_module, seen.bad_gradients) == (True, None, None, None)
    assert not (tmp_path / "none").exists()


def test_small_views_are_among_the_inputs(tmp_path: Path, values: dict[str, Any], prepared: LabelledImages) -> None:
    """Small views that are not finite are told, where the large ones are."""
    normalize, small_views = Images.normalize, {"small_views": {"count": 1, "size": 4}}
    params = Params.model_validate(merged(values, {"contrastive": small_views}))

    def spoilt(self: Images, images: Tensor) -> Tensor:
        return normalize(self, images) * (math.nan if images.shape[-1] == 4 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Images, "normalize", spoilt)
        steps = params.cl.epochs * (len(prepared.pretraining_ids) // params.cl.batch_size)
        with pytest.raises(Replayed) as ended:
            pretrain_cl(Session(prepared, params, StateStore(tmp_path, "code"), Deaf(), fit=Replay("cl", 0, steps).fit))
    assert not ended.value.seen.inputs_finite


def left_states(
    tmp_path: Path, prepared: LabelledImages, params: Params, monkeypatch: pytest.MonkeyPatch, at: int
) -> Path:
    """Stop a training after `at` steps, with a state saved at each. Two states stay: of step at and the one before."""
    monkeypatch.setattr("lgp.training.loop.SAVE_SHARE", math.inf)
    monkeypatch.setattr("lgp.training.saving.BackgroundSaver.is_busy", False)  # so each state is waited for
    often = params.model_copy(update={"run": params.run.model_copy(update={"save_every_s": 1e-9})})
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "asked", lambda _: (tmp_path / "state").exists() and trainers[0].now.step == at)
        trainers: list[Trainer] = []
        fit = lambda trainer: trainers.append(trainer) or trainer.fit()  # type: ignore[func-returns-value]  # noqa: E731
        with pytest.raises(Interrupted):
            pretrain_mim(Session(prepared, often, StateStore(tmp_path / "state", "code"), Silent(), fit=fit))
    return tmp_path / "state"


def test_replay_starts_from_the_newest_state_that_is_not_later_and_touches_none(
    tmp_path: Path,
    prepared: LabelledImages,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    states = left_states(tmp_path, prepared, params, monkeypatch, at=4)
    torn = states / "state-code.new"
    torn.write_bytes(b"half")
    before = files_in(states)
    from_start = {step: replayed(prepared, params, tmp_path / "none", step) for step in (2, 3, 5)}
    capsys.readouterr()
    for step, start in ((5, "from step 4\n"), (3, "from step 3\n"), (2, "")):
        assert replayed(prepared, params, states, step) == from_start[step]
        assert capsys.readouterr().out == (start and f"mim: going on {start}"), step
    assert files_in(states) == before


def test_torn_state_stays_as_it_is_and_the_one_before_serves(
    tmp_path: Path,
    prepared: LabelledImages,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    states = left_states(tmp_path, prepared, params, monkeypatch, at=4)
    latest = states / "state-code.pt"
    latest.write_bytes(latest.read_bytes()[:-1])
    before = files_in(states)
    replayed(prepared, params, states, 5)
    assert "mim: going on from step 3\n" in capsys.readouterr().out
    assert files_in(states) == before


def test_training_that_diverged_by_a_huge_rate_names_the_replay_that_shows_why(
    tmp_path: Path, values: dict[str, Any], prepared: LabelledImages, capsys: pytest.CaptureFixture[str]
) -> None:
    params = changed(values, base_lr=1e4, warmup_epochs=20, weight_decay=0.0, epochs=40)
    with pytest.raises(Diverged) as error:
        pretrain_mim(Session(prepared, params, StateStore(tmp_path, "code"), Silent()))
    said = str(error.value)
    step = int(said.partition("at step ")[2].split()[0])
    assert f"or set clip_norm; `lgp mim --replay {step}` repeats the step; the last good state is kept in" in said
    before = files_in(tmp_path)
    seen = replayed(prepared, params, tmp_path, step, 120)
    assert "mim: going on from step 3\n" in capsys.readouterr().out
    assert seen.step == step
    assert not math.isfinite(seen.loss)
    assert seen.bad_module is not None
    assert seen.bad_gradients is not None
    assert 3 <= seen.bad_gradients < step  # Adam took infinite gradients for a while
    assert not math.isfinite(next(iter(seen.grad_norms.values())))
    assert files_in(tmp_path) == before
    # a later step is never reached
    assert replayed(prepared, params, tmp_path, 119, 120).step == step


def test_first_weight_and_module_that_are_not_finite_are_named(
    tmp_path: Path, prepared: LabelledImages, params: Params
) -> None:
    replay = Replay("mim", 5, STEPS)

    def poisoned(trainer: Trainer) -> Any:
        with torch.no_grad():
            trainer.model.encoder.blocks[1].mlp.fc1.bias[0] = math.nan  # type: ignore[union-attr,index]
        return replay.fit(trainer)

    with pytest.raises(Replayed) as ended:
        pretrain_mim(Session(prepared, params, StateStore(tmp_path, "code"), Deaf(), fit=poisoned))
    seen = ended.value.seen
    assert seen.step == 0
    assert seen.inputs_finite
    assert seen.bad_weight == "encoder.blocks.1.mlp.fc1.bias"
    assert seen.bad_module == "encoder.blocks.1.mlp.fc1"
    rows = dict(seen.rows())
    assert (rows["loss"], rows["images as the encoder gets them"]) == ("nan", "finite")
    assert rows["first module whose output is not finite"] == "encoder.blocks.1.mlp.fc1"
    assert rows["first step whose gradients are not finite"] == "0"
    assert len(rows) == 7 + 5


def test_images_that_are_not_finite_are_told(tmp_path: Path, prepared: LabelledImages, params: Params) -> None:
    seen = replayed(prepared.normalized_by(Normalization((0.5,), (0.0,))), params, tmp_path, 3)
    assert (seen.step, seen.inputs_finite, seen.bad_module) == (0, False, "encoder.patch_embed.proj")
    assert dict(seen.rows())["images as the encoder gets them"] == "not finite"


@pytest.mark.parametrize("step", [-1, 6])
def test_step_outside_the_training_is_refused(step: int) -> None:
    with pytest.raises(LgpError) as error:
        Replay("mim", step, STEPS)
    assert str(error.value) == f"--replay {step} is no step of mim, which has 6: choose one from 0 to 5"


def test_stopped_replay_says_that_nothing_was_written(
    tmp_path: Path, prepared: LabelledImages, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interruption, "asked", lambda _: True)
    session = Session(prepared, params, StateStore(tmp_path / "no", "code"), Deaf(), fit=Replay("mim", 5, STEPS).fit)
    with pytest.raises(Interrupted, match="mim: the replay was stopped, nothing was written"):
        pretrain_mim(session)
    assert not (tmp_path / "no").exists()


@pytest.fixture
def warmed_up(values: dict[str, Any]) -> Params:
    return Params.model_validate(merged(values, {"graft": {"head_warmup_epochs": 1}}))


def test_heads_are_warmed_up_before_the_step_that_is_repeated(
    tmp_path: Path,
    prepared: LabelledImages,
    warmed_up: Params,
    encoder_folder: Path,
    watched: list[tuple[float, float]],
) -> None:
    data = [prepared, warmed_up]
    pretrain_graft(Session(*data, StateStore(tmp_path / "a", "code"), Silent()), encoder_folder, encoder_folder)
    whole = watched.copy()
    assert len(whole) == 3 + STEPS
    fit = Replay("graft", 2, STEPS).fit
    session = Session(*data, StateStore(tmp_path / "b", "code"), Deaf(), fit=fit)
    with pytest.raises(Replayed) as ended:
        pretrain_graft(session, encoder_folder, encoder_folder)
    assert (ended.value.seen.training, ended.value.seen.loss) == ("graft", whole[3 + 2][0])
    assert not (tmp_path / "b").exists()


def test_heads_that_diverge_are_shown_by_the_replay_of_step_0(
    tmp_path: Path,
    prepared: LabelledImages,
    warmed_up: Params,
    encoder_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss_of, poison = "lgp.models.moco.contrastive_loss", {"step": 0}

    def poisoned(queries: Tensor, *rest: Any) -> Tensor:
        poison["step"] += 1
        return queries.sum() * (math.inf if poison["step"] > 4 else 1)  # from step 2 on: two calls a step

    monkeypatch.setattr(loss_of, poisoned)
    data, folders = [prepared, warmed_up], [encoder_folder, encoder_folder]
    with pytest.raises(Diverged, match=r"graft-heads: .* at step 2 .*; `lgp graft --replay 0` repeats the step"):
        pretrain_graft(Session(*data, StateStore(tmp_path / "a", "code"), Silent()), *folders)
    poison["step"] = 0
    session = Session(*data, StateStore(tmp_path / "b", "code"), Deaf(), fit=Replay("graft", 0, STEPS).fit)
    with pytest.raises(Replayed) as ended:
        pretrain_graft(session, *folders)
    assert (ended.value.seen.training, ended.value.seen.step) == ("graft-heads", 2)
    assert ended.value.seen.bad_module is None  # the loss itself
