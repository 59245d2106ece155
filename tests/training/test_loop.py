"""The training loop: reproducible, resumable, and stopping where it must."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from lgp.compute.device import choose_device
from lgp.compute.interruption import Interrupted, Interruption
from lgp.compute.randomness import Stream
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.errors import LgpError
from lgp.params.file import Params
from lgp.params.pretrain import ViewParams
from lgp.params.run import RunParams
from lgp.pretrain.arm import Session
from lgp.pretrain.mim import pretrain_mim
from lgp.training import loop
from lgp.training.loop import Progression, Trainer
from lgp.training.optimizer import adamw, warmup_cosine
from lgp.training.resume_states import StateStore
from lgp.training.saving import BackgroundSaver


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def log_epoch(self, values: dict[str, float]) -> None:
        """Keep the values."""
        self.epochs.append(values)


def compile_as_it_is(block: Block, mode: str, dynamic: bool) -> None:
    """Compile a block without a compiler of C++: only what is compiled is asked."""
    nn.Module.compile(block, backend="eager", dynamic=dynamic)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_steps_after_the_first_are_compiled_and_nothing_that_is_measured(
    tmp_path: Path, prepared: LabelledImages, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch 2.11 never compiles a block that is first called while operations are counted, as in the first step."""
    frames = torch._dynamo.utils.counters["frames"]
    monkeypatch.setattr(Block, "compile", compile_as_it_is)
    stance, counted = torch.compiler.set_stance, list[tuple[Any, int]]()
    monkeypatch.setattr(
        "torch.compiler.set_stance", lambda name: (counted.append((name, frames["ok"])), stance(name))[1]
    )
    # the last of ten epochs has both measures: online k-NN, and whether the training is dead
    changes = {"mim": {"epochs": 10}, "run": {"compile": True, "online_knn": {"every_epochs": 1}}}
    params = Params.model_validate(merged(values, changes))
    torch._dynamo.reset()
    frames.clear()
    result = pretrain_mim(Session(prepared, params, StateStore(tmp_path, "code"), Notes(), prepared))
    assert counted[0] == ("force_eager", 0)
    assert frames["ok"] == frames["total"] == 2  # a block of the encoder, and one of the decoder
    assert result.progression.train_flops > 0
    assert "val/online_knn_top1" in result.progression.history[-1]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_blocks_of_every_rate_of_stochastic_depth_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch stops after eight forms of the same code, and a deep classifier has more rates."""
    frames = torch._dynamo.utils.counters["frames"]
    monkeypatch.setattr(Block, "compile", compile_as_it_is)
    torch._dynamo.reset()
    frames.clear()
    model = VisionTransformer(8, 4, 1, num_classes=2, embed_dim=8, depth=11, num_heads=1, drop_path_rate=0.1).train()
    with loop._compiled(model, as_graphs=False):
        for images in (2, 3, 4):  # shapes are not joined into one that varies
            model(torch.ones(images, 1, 8, 8))
    assert frames["ok"] == frames["total"] == 3 * 11
    torch._dynamo.reset()


def test_loss_that_is_not_finite_stops_with_step_and_rate_and_keeps_the_last_good_state(
    tmp_path: Path, prepared: LabelledImages, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Trainer._backward

    def poisoned(self: Trainer, batch: Batch) -> Any:
        loss = backward(self, batch)
        return loss * float("nan") if batch.step == 4 else loss

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    store = StateStore(tmp_path, "code")
    with pytest.raises(LgpError, match=r"mim: the loss is nan at step 4 .*, learning rate [\d.e-]+: lower") as error:
        pretrain_mim(Session(prepared, params, store, Notes()))
    assert str(tmp_path) in str(error.value)
    state = store.read()
    assert state is not None
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


class Tiny(nn.Linear):
    """One layer on the pixels. It keeps the loss of every step, and whether it was in training mode."""

    def __init__(self) -> None:
        super().__init__(64, 1)
        self.losses: list[float] = []
        self.modes: list[bool] = []

    def loss_of(self, batch: Batch) -> Tensor:
        loss = (self(batch.crops.flatten(1).float() / 255) - 1).square().mean()
        self.losses.append(loss.item())
        self.modes.append(self.training)
        return loss


PER_EPOCH, EPOCHS, BATCH = 4, 3, 48


def tiny(tmp_path: Path, prepared: LabelledImages, **changes: Any) -> Trainer:
    """A training of milliseconds: a layer of 64 weights, a rate of 0.1 that falls to 0."""
    torch.manual_seed(0)
    model = Tiny()
    crops = CropDataset(prepared, ViewParams(crop_scale_min=1.0, flip_p=0.0), 1, BATCH, Stream(0, "tiny"))
    assert crops.steps_per_epoch == PER_EPOCH
    optimizer = adamw([{"params": [p], "lr": lr} for p, lr in ((model.weight, 0.1), (model.bias, 0.01))], (0.9, 0.95))
    settings = {
        "name": "tiny",
        "model": model,
        "loss_of": model.loss_of,
        "crops": crops,
        "optimizer": optimizer,
        "schedule": warmup_cosine(optimizer, EPOCHS * PER_EPOCH, 0),
        "epochs": EPOCHS,
        "device": torch.device("cpu"),
        "precision": torch.float32,
        "settings": RunParams(device="cpu", print_every_s=1000),
        "store": StateStore(tmp_path, "code"),
        "observer": Notes(),
    }
    return Trainer(**settings | changes)


def test_history_has_the_mean_loss_of_each_epoch_and_the_highest_rate_of_its_last_step(
    tmp_path: Path, prepared: LabelledImages
) -> None:
    trainer = tiny(tmp_path, prepared)
    history = trainer.fit().history
    losses = torch.tensor(trainer.model.losses).view(EPOCHS, PER_EPOCH).mean(1).tolist()
    rates = [0.1 * (1 + math.cos(math.pi * (e * PER_EPOCH - 1) / (EPOCHS * PER_EPOCH))) / 2 for e in (1, 2, 3)]
    assert [values["train/loss"] for values in history] == pytest.approx(losses)
    assert [values["train/lr"] for values in history] == pytest.approx(rates)
    assert trainer.observer.epochs == history
    assert losses[-1] < losses[0] / 2


def gradient_norms(trainer: Trainer) -> list[float]:
    """Note the norm of all gradients before each step."""
    norms: list[float] = []

    def note(*_: Any) -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).square().sum().sqrt()))

    trainer.optimizer.register_step_pre_hook(note)
    return norms


def test_history_has_the_mean_norm_of_all_gradients(tmp_path: Path, prepared: LabelledImages) -> None:
    trainer = tiny(tmp_path, prepared)
    norms = gradient_norms(trainer)
    history = trainer.fit().history
    means = torch.tensor(norms).view(EPOCHS, PER_EPOCH).mean(1).tolist()
    assert [values["train/grad_norm"] for values in history] == pytest.approx(means)


def test_longer_gradients_are_scaled_to_the_norm_and_shorter_ones_kept(
    tmp_path: Path, prepared: LabelledImages
) -> None:
    free = gradient_norms(trainer := tiny(tmp_path / "a", prepared))
    trainer.fit()
    limit = free[0] / 2
    clipped = gradient_norms(trainer := tiny(tmp_path / "b", prepared, clip_norm=limit))
    history = trainer.fit().history
    assert clipped[0] == pytest.approx(limit, rel=1e-4)
    assert max(clipped) <= limit * 1.0001
    assert history[0]["train/grad_norm"] > limit / 2  # what is logged is not clipped
    loose = gradient_norms(trainer := tiny(tmp_path / "c", prepared, clip_norm=2 * max(free)))
    trainer.fit()
    assert loose == pytest.approx(free)


def test_measure_after_an_epoch_joins_its_values_and_training_goes_on_in_training_mode(
    tmp_path: Path, prepared: LabelledImages
) -> None:
    def measure(epoch: int) -> dict[str, float]:
        trainer.model.eval()
        return {"double": 2.0 * epoch}

    trainer = tiny(tmp_path, prepared, after_epoch=measure)
    trainer.model.eval()
    assert [(v["epoch"], v["double"]) for v in trainer.fit().history] == [(1, 2), (2, 4), (3, 6)]
    assert trainer.model.modes == [True] * EPOCHS * PER_EPOCH


def test_flops_are_those_of_a_step_times_all_steps(tmp_path: Path, prepared: LabelledImages) -> None:
    product = 2 * BATCH * 64  # forward; the gradient of the weights takes as many
    assert tiny(tmp_path, prepared).fit().train_flops == EPOCHS * PER_EPOCH * 2 * product


@pytest.mark.parametrize("name", ["mim", "cl"])
def test_accumulated_parts_train_as_the_whole_batch_does(tmp_path: Path, prepared: LabelledImages, name: str) -> None:
    parts = RunParams(device="cpu", print_every_s=1000, accumulate={"mim": 3, "cl": 3})
    whole, cut = tiny(tmp_path / "a", prepared), tiny(tmp_path / "b", prepared, settings=parts, name=name)
    losses = [[values["train/loss"] for values in trainer.fit().history] for trainer in (whole, cut)]
    assert len(cut.model.losses) == EPOCHS * PER_EPOCH * (3 if name == "mim" else 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(whole.model.weight, cut.model.weight, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "epoch_ends", "took", "every_s", "due"),
    [
        (5, False, 0.0, 60.0, False),
        (5, False, 0.0, 50.0, True),  # that long ago
        (5, True, 1.0, 60.0, True),  # saving takes 2 % of the time
        (5, True, 1.01, 60.0, False),  # more
        (5, False, 1.01, 10.0, False),
        (12, False, 9.0, 60.0, True),  # the last step
    ],
)
def test_state_is_due_at_the_end_of_an_epoch_and_after_a_while_where_saving_is_quick(
    tmp_path: Path,
    prepared: LabelledImages,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    epoch_ends: bool,
    took: float,
    every_s: float,
    due: bool,
) -> None:
    trainer = tiny(tmp_path, prepared, settings=RunParams(device="cpu", save_every_s=every_s))
    trainer.now, trainer._saved_at, trainer._saver = Progression(step=step), 100.0, BackgroundSaver(trainer.store)
    trainer._saver.took = took
    monkeypatch.setattr("time.monotonic", lambda: 150.0)
    assert trainer._save_due(epoch_ends, total=12) is due


class Slow:
    """Makes the saving of a training wait until it is told to go on, or fail."""

    def __init__(self, trainer: Trainer) -> None:
        self.begun, self.may_end, self.save = threading.Event(), threading.Event(), trainer.store.save
        self.failure: Exception | None = None
        trainer.store.save = self.slowly  # type: ignore[method-assign]

    def slowly(self, state: Any) -> None:
        self.begun.set()
        assert self.may_end.wait(60)
        if self.failure is not None:
            raise self.failure
        self.save(state)


def test_training_goes_on_while_a_state_is_written_and_saves_no_second_one(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first state is of the first epoch. Its writing ends in the last one, whatever the steps between took."""
    trainer = tiny(tmp_path, prepared)
    steps, slow, take_step = saved_at(trainer), Slow(trainer), Trainer._step

    def step(self: Trainer, *about: Any) -> None:
        take_step(self, *about)
        if self.now.step == 2 * PER_EPOCH + 1:
            slow.may_end.set()

    monkeypatch.setattr(Trainer, "_step", step)
    monkeypatch.setattr(loop, "SAVE_SHARE", math.inf)
    trainer.fit()
    assert slow.begun.is_set()
    assert steps == [PER_EPOCH, EPOCHS * PER_EPOCH]


def test_stop_and_divergence_wait_for_the_state_that_is_being_written(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, step, said in (("stop", 5, "its state is saved"), ("nan", PER_EPOCH, "is kept in")):
        trainer = tiny(tmp_path / name, prepared)
        slow, loss_of = Slow(trainer), trainer.model.loss_of
        threading.Timer(0.2, slow.may_end.set).start()
        if name == "nan":
            trainer.loss_of = lambda batch, of=loss_of: of(batch) * (math.nan if batch.step == 5 else 1)
        with monkeypatch.context() as patch:
            patch.setattr(Interruption, "asked", lambda _, t=trainer, n=name: n == "stop" and t.now.step == 5)
            with pytest.raises((Interrupted, LgpError), match=said):
                trainer.fit()
        state = trainer.store.read()
        assert state is not None
        assert state["progression"]["step"] == step
        assert not trainer._saver.is_busy


@pytest.mark.parametrize(
    ("slow_s", "saved", "said"), [(0.0, [4], "its state of step 4 is saved"), (60.0, [4, 5], "its state is saved")]
)
def test_stop_that_waited_for_a_slow_state_writes_no_other(
    tmp_path: Path,
    prepared: LabelledImages,
    monkeypatch: pytest.MonkeyPatch,
    slow_s: float,
    saved: list[int],
    said: str,
) -> None:
    trainer = tiny(tmp_path, prepared)
    steps, slow, settled = saved_at(trainer), Slow(trainer), BackgroundSaver.settled

    def waited_for(saver: BackgroundSaver) -> bool:
        if saver.is_busy:
            slow.may_end.set()
        return settled(saver)

    monkeypatch.setattr(BackgroundSaver, "settled", waited_for)
    monkeypatch.setattr(Interruption, "asked", lambda _: trainer.now.step == 5)
    monkeypatch.setattr(loop, "SLOW_S", slow_s)
    with pytest.raises(Interrupted, match=rf"stopped at step 5 .*, {said}"):
        trainer.fit()
    assert steps == saved


@pytest.mark.parametrize("slow_s", [0.0, 60.0])
def test_stop_that_waited_for_nothing_saves_its_step(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch, slow_s: float
) -> None:
    trainer = tiny(tmp_path, prepared)
    steps = saved_at(trainer)
    monkeypatch.setattr(Interruption, "asked", lambda _: trainer.now.step == 5 and not trainer._saver.wait())  # type: ignore[func-returns-value]
    monkeypatch.setattr(loop, "SLOW_S", slow_s)
    with pytest.raises(Interrupted, match="its state is saved"):
        trainer.fit()
    assert steps == [PER_EPOCH, 5]


@pytest.mark.parametrize("ends", [False, True], ids=["in a later step", "at the end"])
def test_failed_write_ends_the_training(tmp_path: Path, prepared: LabelledImages, ends: bool) -> None:
    trainer = tiny(tmp_path, prepared, epochs=1 if ends else EPOCHS)
    slow = Slow(trainer)
    slow.failure = PermissionError(13, "no")
    slow.may_end.set()
    with pytest.raises(PermissionError):
        trainer.fit()
    assert not trainer.store.has_state()


def test_error_of_the_training_is_not_replaced_by_one_of_the_write(tmp_path: Path, prepared: LabelledImages) -> None:
    def broken(epoch: int) -> dict[str, float]:
        if epoch == 2:
            raise RuntimeError("of the training")
        return {}

    trainer = tiny(tmp_path, prepared, after_epoch=broken)
    slow = Slow(trainer)
    slow.failure = PermissionError(13, "no")
    threading.Timer(0.5, slow.may_end.set).start()
    with pytest.raises(RuntimeError, match="of the training"):
        trainer.fit()
    assert not trainer._saver.is_busy


def test_losses_are_checked_every_twenty_steps_and_the_first_bad_one_is_named(
    tmp_path: Path, prepared: LabelledImages
) -> None:
    trainer = tiny(tmp_path, prepared, epochs=10)
    trainer.schedule = warmup_cosine(trainer.optimizer, 100, 0)
    crops = CropDataset(prepared, ViewParams(crop_scale_min=1.0, flip_p=0.0), 1, 5, Stream(0, "tiny"))
    loss_of = trainer.model.loss_of
    trainer.crops, trainer.loss_of = crops, lambda batch: loss_of(batch) * (math.inf if batch.step == 17 else 1)
    rate = 0.1 * (1 + math.cos(math.pi * 17 / 100)) / 2
    with pytest.raises(LgpError) as error:
        trainer.fit()
    images = ", ".join(map(str, crops.ids_of(17)[:5]))
    assert str(error.value) == (
        f"tiny: the loss is inf at step 17 (images {images}, …), learning rate {rate:.3g}: lower the learning rate of "
        "tiny, lengthen its warm-up or set clip_norm"
    )
    assert len(trainer.model.losses) == 20


def test_earlier_epochs_are_logged_again_and_another_precision_is_told(
    tmp_path: Path, prepared: LabelledImages, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tiny(tmp_path, prepared)
    history = whole.fit().history
    capsys.readouterr()
    again = tiny(tmp_path, prepared)
    assert again.fit().history == again.observer.epochs == history
    assert not again.model.losses
    assert torch.equal(again.model.weight, whole.model.weight)
    assert again.optimizer.state_dict()["state"][0]["step"] == EPOCHS * PER_EPOCH
    assert capsys.readouterr().out == "tiny: going on from step 12\n"
    tiny(tmp_path, prepared, precision=torch.bfloat16).fit()
    assert "warning: tiny ran in torch.float32, it now runs in torch.bfloat16" in capsys.readouterr().out


def test_mixed_precision_is_of_the_loss_alone(tmp_path: Path, prepared: LabelledImages) -> None:
    seen = []
    trainer = tiny(tmp_path, prepared, precision=torch.bfloat16, epochs=1)
    trainer.model.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    trainer.fit()
    assert set(seen) == {torch.bfloat16}
    assert trainer.model.weight.dtype == torch.float32


def test_mixed_precision_is_the_one_that_is_given() -> None:
    """Not a device's own: bfloat16 is a CPU's."""
    layer, batch = nn.Linear(4, 4), Batch.whole(torch.ones(2, 4), 0)
    for precision in (torch.float16, torch.bfloat16, torch.float32):
        assert loop._LossModule(layer, lambda b: layer(b.crops), precision)(batch).dtype == precision


def test_state_that_waited_for_a_slow_one_is_saved_where_the_training_goes_on(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny(tmp_path, prepared)
    trainer.now, trainer._disk_full, trainer._saver = Progression(step=1), False, BackgroundSaver(trainer.store)
    steps, slow = saved_at(trainer), Slow(trainer)
    monkeypatch.setattr(loop, "SLOW_S", 0.0)
    trainer._save()
    trainer.now.step = 2
    threading.Timer(0.1, slow.may_end.set).start()
    trainer._save()
    trainer._saver.wait()
    assert steps == [1, 2]


def test_full_disk_is_told_once_until_there_is_room_again(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny(tmp_path, prepared)
    trainer.now, trainer._disk_full, trainer._saver = Progression(), False, BackgroundSaver(trainer.store)
    failures: list[OSError | None] = [OSError(28, "full"), OSError(28, "full"), None, OSError(28, "full")]

    def save(_: Any) -> None:
        if (failure := failures.pop(0)) is not None:
            raise failure

    monkeypatch.setattr(trainer.store, "save", save)
    full = []
    for _ in range(4):
        trainer._save()
        for _ in range(2):  # asked again, it is as full as before
            trainer._settle()
        full.append(trainer._disk_full)
    assert full == [True, True, False, True]
    assert capsys.readouterr().out.count("tiny: disk full") == 2
    failures.append(PermissionError(13, "no"))
    trainer._save()
    with pytest.raises(PermissionError):
        trainer._settle()


@pytest.mark.parametrize(
    ("reason", "saved", "full", "expected"),
    [
        (
            "SIGINT",
            3,
            False,
            "tiny: stopped at step 3 (SIGINT), its state is saved: run the same command again to go on",
        ),
        (
            "SIGTERM",
            2,
            False,
            "tiny: stopped at step 3 (SIGTERM), its state of step 2 is saved: run the same command again to go on",
        ),
        (
            "",
            3,
            True,
            "tiny: stopped at step 3 (another process), the disk is full, its last state is older: run the same "
            "command again to go on",
        ),
    ],
)
def test_stop_says_why_and_whether_the_state_is_saved(
    tmp_path: Path, prepared: LabelledImages, reason: str, saved: int, full: bool, expected: str
) -> None:
    trainer, interruption = tiny(tmp_path, prepared), Interruption()
    trainer.now, trainer._saved_step, trainer._disk_full = Progression(step=3), saved, full
    interruption.reason = reason
    with pytest.raises(Interrupted) as error:
        trainer._stop(interruption)
    assert str(error.value) == expected
    assert error.value.exit_code == 128 + 15


def test_training_that_is_asked_to_stop_saves_and_goes_on_to_the_same_weights(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(tmp_path / "whole", prepared)
    whole.fit()
    stopped = tiny(tmp_path / "state", prepared)
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "asked", lambda _: stopped.now.step == 5)
        with pytest.raises(Interrupted, match="tiny: stopped at step 5"):
            stopped.fit()
    resumed = tiny(tmp_path / "state", prepared)
    assert resumed.fit().history == whole.now.history
    assert len(resumed.model.losses) == EPOCHS * PER_EPOCH - 5
    assert resumed.now.first_loss == pytest.approx(whole.model.losses[0])
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_processes_are_asked_when_it_is_due_and_at_the_end_of_every_epoch(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    class Rare:
        def __init__(self, step: int) -> None:
            assert step == 0

        def is_due(self, step: int) -> bool:
            return step == 6

        def reach(self, step: int, request: int) -> int:
            asked.append((step, request))
            return loop.STOP if step == 6 else request

    monkeypatch.setattr(loop, "Agreement", Rare)
    monkeypatch.setattr(Interruption, "asked", lambda _: False)
    with pytest.raises(Interrupted, match="tiny: stopped at step 6"):  # as another process asks
        tiny(tmp_path, prepared).fit()
    assert asked == [(PER_EPOCH, loop.SAVE), (6, loop.GO_ON)]


def test_stop_at_the_last_step_is_the_end(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny(tmp_path, prepared)
    monkeypatch.setattr(Interruption, "asked", lambda _: trainer.now.step == EPOCHS * PER_EPOCH)
    assert trainer.fit().step == EPOCHS * PER_EPOCH


# what the loop gives to the parts around it


class Shown:
    """Stands for the progress line: keeps what it was made with, and the steps and losses that it shows."""

    made: list["Shown"]

    def __init__(self, *about: Any) -> None:
        self.about, self.steps = about, list[tuple[int, float | None]]()
        self.made.append(self)

    def showing(self) -> Any:
        return nullcontext()

    def step(self, done: int, loss: float | None) -> None:
        self.steps.append((done, loss))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Shown]:
    Shown.made = []
    monkeypatch.setattr(loop, "Progress", Shown)
    return Shown.made


def test_progress_shows_the_newest_loss_at_each_check(
    tmp_path: Path, prepared: LabelledImages, shown: list[Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check is at the end of an epoch, every 20 steps, and before a state is saved."""
    trainer = tiny(tmp_path, prepared, epochs=2, settings=RunParams(device="cpu", print_every_s=7))
    trainer.crops = CropDataset(prepared, ViewParams(crop_scale_min=1.0), 1, 5, Stream(0, "tiny"))
    saving = Trainer._save_due
    monkeypatch.setattr(Trainer, "_save_due", lambda self, *about: self.now.step == 7 or saving(self, *about))
    trainer.fit()
    assert shown[0].about == ("tiny", 2, 44, 5, 0, 7)
    assert [step for step, _ in shown[0].steps] == [7, 20, 40, 44, 60, 80, 88]
    assert [loss for _, loss in shown[0].steps] == [
        pytest.approx(trainer.model.losses[s - 1]) for s, _ in shown[0].steps
    ]


def test_progress_goes_on_from_the_resumed_step(
    tmp_path: Path, prepared: LabelledImages, shown: list[Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = tiny(tmp_path, prepared)
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "asked", lambda _: stopped.now.step == 5)
        with pytest.raises(Interrupted):
            stopped.fit()
    tiny(tmp_path, prepared).fit()
    assert [progress.about[4] for progress in shown] == [0, 5]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_loader_reads_the_steps_that_are_left_for_the_device(
    device: str, tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EnoughError(Exception):
        pass

    def noted(*about: Any) -> Any:
        asked.append(about)
        raise EnoughError

    asked: list[Any] = []
    monkeypatch.setattr(loop, "loader", noted)
    settings = RunParams(device="cpu", workers=3)
    trainer = tiny(tmp_path, prepared, device=torch.device(device), settings=settings)
    with pytest.raises(EnoughError):
        trainer.fit()
    assert asked == [(trainer.crops, 0, EPOCHS * PER_EPOCH, 3, torch.device(device))]


def saved_at(trainer: Trainer) -> list[int]:
    """Note the steps at which a training saves its state."""
    steps, save = list[int](), trainer.store.save
    trainer.store.save = lambda state: (steps.append(state["progression"]["step"]), save(state))[1]  # type: ignore[method-assign]
    return steps


def test_first_state_is_saved_after_the_first_epoch_and_the_last_however_long_saving_takes(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SHARE", 0.0)
    steps = saved_at(trainer := tiny(tmp_path, prepared))
    trainer.fit()
    assert steps == [PER_EPOCH, EPOCHS * PER_EPOCH]


def test_flops_are_counted_in_the_first_step_alone_and_nothing_is_printed(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, counted = tiny(tmp_path, prepared), list[int]()
    count = loop.FlopCounterMode
    monkeypatch.setattr(loop, "FlopCounterMode", lambda **how: counted.append(trainer.now.step) or count(**how))  # type: ignore[func-returns-value]
    trainer.fit()
    assert counted == [0]
    assert [line[:11] for line in capsys.readouterr().out.splitlines()] == ["tiny: epoch"]


def test_parameter_without_a_gradient_does_not_move(tmp_path: Path, prepared: LabelledImages) -> None:
    trainer = tiny(tmp_path, prepared)
    whole, biases = trainer.model.loss_of, list[float]()

    def loss_of(batch: Batch) -> Tensor:
        biases.append(trainer.model.bias.item())
        if batch.step == 0:
            return whole(batch)
        return (batch.crops.flatten(1).float() @ trainer.model.weight.T).square().mean()

    trainer.loss_of = loss_of
    trainer.fit()
    assert biases[1] != biases[0]
    assert set(biases[2:]) == {biases[1]}


def test_dead_training_ends_with_its_state_and_is_not_continued(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = tiny(tmp_path / "whole", prepared, is_dead=lambda now: asked.append(len(now.history)) or False)  # type: ignore[func-returns-value]
    whole.fit()
    assert asked == [1, 2]  # the last epoch ends it anyway
    assert not whole.now.ended_early
    dead = tiny(tmp_path / "dead", prepared, is_dead=lambda now: len(now.history) == 2)
    steps = saved_at(dead)
    now = dead.fit()
    assert (now.step, now.ended_early, len(now.history)) == (2 * PER_EPOCH, True, 2)
    assert now.train_flops == whole.now.train_flops * 2 // 3
    assert isinstance(now.train_flops, int)
    assert steps[-1] == 2 * PER_EPOCH
    again = tiny(tmp_path / "dead", prepared, is_dead=lambda _: pytest.fail("it is over"))
    asked_of: list[Any] = []
    load = loop.loader
    monkeypatch.setattr(loop, "loader", lambda *about: asked_of.append(about[1:3]) or load(*about))  # type: ignore[func-returns-value]
    assert again.fit() == now
    assert asked_of == [(2 * PER_EPOCH, 2 * PER_EPOCH)]
    assert not again.model.losses


def test_what_fell_is_told_after_its_epoch(
    tmp_path: Path, prepared: LabelledImages, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(tmp_path, prepared, alarms=lambda history: ["it fell"] if len(history) == 2 else []).fit()
    warned, _ = capsys.readouterr().out.splitlines()  # and the last line of the progress
    assert warned == "warning: tiny: it fell, after epoch 2 (step 8)"


def test_other_process_neither_reads_nor_saves_nor_measures_nor_prints(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(tmp_path, prepared).fit()
    capsys.readouterr()
    monkeypatch.setattr(loop, "rank", lambda: 1)
    asked = {
        "after_epoch": lambda _: pytest.fail("it measured"),
        "is_dead": lambda _: pytest.fail("it asked"),
        "alarms": lambda _: pytest.fail("it looked"),
    }
    other = tiny(tmp_path, prepared, settings=RunParams(device="cpu", print_every_s=0), **asked)
    steps = saved_at(other)
    assert other.fit().step == EPOCHS * PER_EPOCH
    assert len(other.model.losses) == EPOCHS * PER_EPOCH
    assert not steps
    assert not capsys.readouterr().out
    assert not other._save_due(True, EPOCHS * PER_EPOCH)
    other._save()
    assert not steps


def test_other_process_goes_on_from_the_state_it_is_sent(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tiny(tmp_path, prepared)
    whole.fit()
    capsys.readouterr()
    sent: list[Any] = []

    def received(state: Any, device: torch.device) -> Any:
        sent.append((state, device))
        return StateStore(tmp_path, "code").read()

    monkeypatch.setattr(loop, "rank", lambda: 1)
    monkeypatch.setattr(loop, "send_state", received)
    other = tiny(tmp_path / "other", prepared, precision=torch.bfloat16)
    assert other.fit() == whole.now
    assert sent == [(None, torch.device("cpu"))]
    assert not capsys.readouterr().out


def test_resumed_training_keeps_nothing_that_lies_in_the_file(tmp_path: Path, prepared: LabelledImages) -> None:
    whole = tiny(tmp_path, prepared)
    whole.fit()
    again = tiny(tmp_path, prepared)
    again.fit()
    del whole
    assert str(again.store.latest) not in Path("/proc/self/maps").read_text()
    steps = [state["step"] for state in again.optimizer.state_dict()["state"].values()]
    assert [(step.device.type, step.item()) for step in steps] == [("cpu", EPOCHS * PER_EPOCH)] * 2


def test_state_of_another_model_is_not_loaded_in_part(tmp_path: Path, prepared: LabelledImages) -> None:
    tiny(tmp_path, prepared).fit()
    store = StateStore(tmp_path, "code")
    state = store.read()
    assert state is not None
    del state["model"]["bias"]
    store.save(state)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        tiny(tmp_path, prepared).fit()


class Shared(nn.Module):
    """Stands for DistributedDataParallel. It notes which parts are computed without an exchange of gradients."""

    made: list["Shared"]

    def __init__(self, module: nn.Module, *, gradient_as_bucket_view: bool) -> None:
        super().__init__()
        assert gradient_as_bucket_view is True  # which saves the memory of all gradients
        self.module, self.alone = module, False
        self.parts: list[bool] = []
        self.made.append(self)

    def forward(self, batch: Batch) -> Any:
        self.parts.append(self.alone)
        return self.module(batch)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.alone = True
        yield
        self.alone = False


def test_several_processes_exchange_gradients_with_the_last_part_and_all_count_in_the_flops(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    Shared.made = []
    alone = tiny(tmp_path / "alone", prepared)
    alone.fit()
    monkeypatch.setattr(loop, "world_size", lambda: 2)
    monkeypatch.setattr(loop, "DistributedDataParallel", Shared)
    parts = RunParams(device="cpu", print_every_s=1000, accumulate={"mim": 3})
    trainer = tiny(tmp_path / "two", prepared, settings=parts, name="mim")
    trainer.fit()
    (shared,) = Shared.made
    assert shared.module.model is trainer.model  # whose gradients are exchanged
    assert shared.parts == [True, True, False] * EPOCHS * PER_EPOCH
    assert trainer.now.train_flops == 2 * alone.now.train_flops


def test_parts_of_two_are_cut_too(tmp_path: Path, prepared: LabelledImages) -> None:
    parts = RunParams(device="cpu", print_every_s=1000, accumulate={"mim": 2})
    trainer = tiny(tmp_path, prepared, settings=parts, name="mim")
    trainer.fit()
    assert len(trainer.model.losses) == 2 * EPOCHS * PER_EPOCH


def test_batch_without_a_word_of_parts_is_whole(tmp_path: Path, prepared: LabelledImages) -> None:
    trainer = tiny(tmp_path, prepared, name="mim", settings=RunParams(device="cpu", accumulate={"cl": 2}))
    trainer.fit()
    assert len(trainer.model.losses) == EPOCHS * PER_EPOCH


@pytest.mark.parametrize(
    ("name", "is_checkpointed"), [("mim", True), ("mim-heads", True), ("cl", False), ("cl-heads", False)]
)
def test_blocks_of_the_arms_that_ask_for_it_are_checkpointed_also_for_their_heads(
    name: str, is_checkpointed: bool, tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr(loop, "_checkpointed", lambda model: asked.append(model) or nullcontext())  # type: ignore[func-returns-value]
    settings = RunParams(device="cpu", grad_checkpointing=["mim", "graft"])
    trainer = tiny(tmp_path, prepared, name=name, settings=settings, epochs=1)
    trainer.fit()
    assert asked == ([trainer.model] if is_checkpointed else [])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("graft", "; `lgp graft --replay 7` repeats the step"),
        ("graft-heads", "; `lgp graft --replay 0` repeats the step"),
        ("finetune", ""),
        ("tiny-heads", ""),
    ],
)
def test_command_that_repeats_a_step_is_of_an_arm(name: str, said: str) -> None:
    assert loop.replay_hint(name, 7) == said


def test_losses_of_all_processes_are_averaged(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "average", lambda values: values + 10)
    trainer = tiny(tmp_path, prepared)
    losses = [values["train/loss"] for values in trainer.fit().history]
    own = torch.tensor(trainer.model.losses).view(EPOCHS, PER_EPOCH).mean(1)
    assert losses == pytest.approx((own + 10).tolist())


def test_bad_loss_right_after_a_check_is_named_by_its_own_step_and_rate(
    tmp_path: Path, prepared: LabelledImages
) -> None:
    trainer = tiny(tmp_path, prepared)
    loss_of = trainer.model.loss_of
    trainer.loss_of = lambda batch: loss_of(batch) * (math.nan if batch.step >= 9 else 1)
    rate = 0.1 * (1 + math.cos(math.pi * 9 / 12)) / 2
    with pytest.raises(LgpError, match=rf"the loss is nan at step 9 .*learning rate {rate:.3g}.*is kept in {tmp_path}"):
        trainer.fit()
