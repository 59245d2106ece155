"""The one training loop. It trains on counted batches and logs the loss of each epoch.

It can stop and resume at any step.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from lgp.compute.distributed import agree, average, rank, send_state, world_size
from lgp.compute.interruption import Interrupted, Interruption
from lgp.compute.nested import copied
from lgp.data.loading import Batch, CropDataset, loader
from lgp.errors import Diverged, is_disk_full
from lgp.params.arms import OF_SINGLE_IMAGES, TRAINED
from lgp.params.run import RunParams
from lgp.training.agreement import Agreement
from lgp.training.alarms import fallen
from lgp.training.progress import Progress
from lgp.training.resume_states import StateStore
from lgp.training.saving import BackgroundSaver

SHOWN_IDS = 5  # of a batch's images, in a message
CHECK_EVERY = 20  # steps between checks of the loss: each check makes a GPU wait
SAVE_SHARE = 0.02  # largest fraction of the time for saving
MOST_FORMS_OF_A_BLOCK = 8  # shapes of its input, with and without gradients
SLOW_S = 10.0  # two states that each take longer may not be written before torchrun and schedulers kill, after 30 s
GO_ON, SAVE, STOP = range(3)  # requests of a process; all processes follow the largest

Epoch = dict[str, float]


class Observer(Protocol):
    """A tracker of experiments. It logs epochs."""

    def log_epoch(self, values: Epoch) -> None:
        """Log `epoch` (from 1), `train/loss` and `train/grad_norm` (their means), `train/lr`, and more.

        `train/lr` is the highest rate of its last step.
        """


@dataclass
class Progression:
    """The progress of a training. A resume state contains it, beside model and optimizer."""

    step: int = 0
    first_loss: float = math.nan  # of the first step
    loss_sum: float = 0.0  # over the steps of the running epoch
    norm_sum: float = 0.0  # of all gradients, likewise
    train_flops: int = 0  # of the whole training, counted on its first step; of the steps done where it ended early
    ended_early: bool = False
    history: list[Epoch] = field(default_factory=list)


class _LossModule(nn.Module):
    """A loss as the forward pass of a module. DistributedDataParallel can wrap it."""

    def __init__(self, model: nn.Module, loss_of: Callable[[Batch], Tensor], precision: torch.dtype) -> None:
        super().__init__()
        self.model, self.loss_of, self.precision = model, loss_of, precision

    def forward(self, batch: Batch) -> Tensor:
        mixed = self.precision != torch.float32
        with torch.autocast(batch.crops.device.type, self.precision) if mixed else nullcontext():
            return self.loss_of(batch)


@contextmanager
def _compiled(model: nn.Module, as_graphs: bool) -> Iterator[None]:
    """Compile the blocks of a model while it trains. A training has few shapes, so each is compiled for itself.

    As CUDA graphs the kernels of a block are started together: for a small model, to start them one by one takes longer
    than they run.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.compile(mode="reduce-overhead" if as_graphs else "default", dynamic=False)
    # Blocks share their code. Each rate of stochastic depth is compiled for itself, and torch would stop after eight.
    with torch._dynamo.config.patch(recompile_limit=MOST_FORMS_OF_A_BLOCK * len(blocks)):
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Let the transformers of a model keep only the inputs of their blocks while it trains."""
    transformers = [module for module in model.modules() if isinstance(module, VisionTransformer)]
    for transformer in transformers:
        transformer.set_grad_checkpointing(True)
    try:
        yield
    finally:
        for transformer in transformers:
            transformer.set_grad_checkpointing(False)


def _nothing_more(_epoch: int) -> Epoch:
    return {}


def _never_dead(_now: Progression) -> bool:
    return False


def replay_hint(name: str, step: int) -> str:
    """Return the command that repeats a step of a training, as the end of a message; none if no command does.

    A warm-up of heads is part of its arm's training. Any replay of that passes through it, and ends where it diverges.
    """
    arm, _, part = name.partition("-")
    return f"; `lgp {arm} --replay {0 if part else step}` repeats the step" if arm in TRAINED else ""


@dataclass(kw_only=True)
class Trainer:
    """A model, its loss, and its training batches.

    Under `torchrun` each process trains on its rows of every batch. The first one alone saves, prints and logs.

    Attributes:
        name: the stage, for messages.
        model: on `device`. A resume state contains its state, buffers included.
        loss_of: returns the loss of a batch, the mean over its images.
        crops: the batch of each step.
        optimizer: over the model's trainable parameters.
        schedule: sets the learning rates of a step.
        epochs: passes over the images.
        device: where the model is.
        precision: of matrix products. Weights, losses and norms stay in single precision.
        settings: the `run` section.
        store: the resume states. `fit` continues from the newest one, if any.
        observer: logs every epoch. After a resume it logs the earlier epochs again.
        clip_norm: the largest norm of all gradients together; longer ones are scaled down to it. None: any.
        after_epoch: called by the first process with an epoch's number, from 1. The observer logs what it measures.
        alarms: called by the first process with all epochs after each; returns lines to print as warnings.
        is_dead: called by the first process after each epoch but the last. True ends the training.
    """

    name: str
    model: nn.Module
    loss_of: Callable[[Batch], Tensor]
    crops: CropDataset
    optimizer: Optimizer
    schedule: CosineLRScheduler
    epochs: int
    device: torch.device
    precision: torch.dtype
    settings: RunParams
    store: StateStore
    observer: Observer
    clip_norm: float | None = None
    after_epoch: Callable[[int], Epoch] = _nothing_more
    alarms: Callable[[Sequence[Epoch]], list[str]] = fallen
    is_dead: Callable[[Progression], bool] = _never_dead

    def fit(self) -> Progression:
        """Train to the end, from the newest resume state or from the start.

        A training that is dead ends early in all processes, with its state saved. It is not continued.

        Raises:
            Diverged: the loss is not finite. The message says step and rate. The last good state is kept.
            Interrupted: a stop was requested. A state is saved: of this step, or of the one that the message names.
        """
        self.now = Progression()
        self._resume()
        for values in self.now.history:
            self.observer.log_epoch(values)
        self._unchecked: list[tuple[Tensor, Tensor, float]] = []  # loss, norm of the gradients, rate
        self._saved_at, self._saved_step, self._saver = time.monotonic(), self.now.step, BackgroundSaver(self.store)
        self._disk_full = False
        self._parameters = list(self.model.parameters())  # to look them up takes 5 % of a step at the size of digits
        # a contrastive model takes the whole batch, and cuts it itself
        self._parts = self.settings.accumulate.get(self.name, 1) if self.name in OF_SINGLE_IMAGES else 1
        self._loss = self._shared(_LossModule(self.model, self.loss_of, self.precision))
        per_epoch, total = self.crops.steps_per_epoch, self.epochs * self.crops.steps_per_epoch
        every_s = self.settings.print_every_s if rank() == 0 else None
        progress = Progress(self.name, self.epochs, per_epoch, self.crops.batch_size, self.now.step, every_s)
        last = self.now.step if self.now.ended_early else total
        interruption, agreement = Interruption(), Agreement(self.now.step)
        self.model.train()
        arm = self.name.partition("-")[0]  # also in the warm-up of its heads
        checkpoints = arm in self.settings.grad_checkpointing
        # torch's checkpointing compares the devices of saved tensors, and those of a graph differ the second time
        recomputes = checkpoints or (arm not in OF_SINGLE_IMAGES and self.settings.accumulate.get(arm, 1) > 1)
        self._graphs = self.settings.compile and self.device.type == "cuda" and not recomputes
        compiled = _compiled(self.model, self._graphs) if self.settings.compile else nullcontext()
        checkpointed = _checkpointed(self.model) if checkpoints else nullcontext()
        with interruption.listening(), progress.showing(), compiled, checkpointed, self._saving():
            for crops in loader(self.crops, self.now.step, last, self.settings.workers, self.device):
                self._step(crops, total)
                if not self._saver.is_busy:
                    self._settle()
                epoch_ends = self.now.step % per_epoch == 0
                request = GO_ON
                if epoch_ends or agreement.is_due(self.now.step):
                    own = STOP if interruption.asked() else SAVE if self._save_due(epoch_ends, total) else GO_ON
                    request = agreement.reach(self.now.step, own)
                if epoch_ends or request or self.now.step % CHECK_EVERY == 0:
                    progress.step(self.now.step, self._check_losses())
                if epoch_ends:
                    self._end_epoch()
                    self._end_if_dead(total)
                stops = request == STOP and self.now.step < total and not self.now.ended_early
                if request or self.now.ended_early:
                    self._save(stops)
                if self.now.ended_early:
                    break
                if stops:
                    self._settle()
                    self._stop(interruption)
        return self.now

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Wait at the end of the block until the last state is written, also where an error ends it."""
        try:
            yield
            self._settle()
        finally:
            self._saver.wait()

    def _shared(self, loss: _LossModule) -> nn.Module:
        """Divide the training among the processes, if there are several: equal weights, averaged gradients."""
        if world_size() == 1:
            return loss
        return DistributedDataParallel(loss, gradient_as_bucket_view=True)

    def _step(self, crops: Tensor, total: int) -> None:
        step = self.now.step
        self.schedule.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs returned in the last step is read no more
        batch = self.crops.batch(step, crops)
        if step == 0:
            # torch 2.11 never compiles a block that is first called while operations are counted
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
                loss = self._backward(batch)
            self.now.train_flops = counter.get_total_flops() * world_size() * total
        else:
            loss = self._backward(batch)
        norm = self._clipped()
        self.optimizer.step()
        self._unchecked.append((loss, norm, self._rate))
        self.now.step += 1

    def _backward(self, batch: Batch) -> Tensor:
        losses = []
        parts = batch.split(self._parts)
        for i, part in enumerate(parts):
            # gradients are averaged over the processes once, with the last part
            with self._alone() if i < len(parts) - 1 else nullcontext():
                loss: Tensor = self._loss(part) / len(parts)
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _clipped(self) -> Tensor:
        """Return the norm of all gradients, and clip them where that is asked for."""
        parameters = [p for p in self._parameters if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.clip_norm, norm)
        return norm

    def _alone(self) -> AbstractContextManager[None]:
        return self._loss.no_sync() if isinstance(self._loss, DistributedDataParallel) else nullcontext()

    @property
    def _rate(self) -> float:
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def _check_losses(self) -> float | None:
        """Read the losses since the last check. Return the newest. Raise `Diverged` at the first that is not finite."""
        if not self._unchecked:
            return None
        losses, norms, rates = zip(*self._unchecked, strict=True)
        values = average(torch.stack(losses)).tolist()
        first = self.now.step - len(values)
        for step, value, rate in zip(range(first, self.now.step), values, rates, strict=True):
            if not math.isfinite(value):
                ids = ", ".join(map(str, self.crops.ids_of(step)[:SHOWN_IDS]))
                raise Diverged(
                    f"{self.name}: the loss is {value} at step {step} (images {ids}, …), learning rate {rate:.3g}: "
                    f"lower the learning rate of {self.name}, lengthen its warm-up or set clip_norm"
                    f"{replay_hint(self.name, step)}{self._kept()}"
                )
        self._unchecked.clear()
        if not first:
            self.now.first_loss = values[0]
        self.now.loss_sum += math.fsum(values)
        self.now.norm_sum += math.fsum(torch.stack(norms).tolist())
        return float(values[-1])

    def _kept(self) -> str:
        self._saver.wait()
        return f"; the last good state is kept in {self.store.folder}" if self.store.has_state() else ""

    def _end_epoch(self) -> None:
        epoch = len(self.now.history) + 1
        values = {
            "epoch": float(epoch),
            "train/loss": self.now.loss_sum / self.crops.steps_per_epoch,
            "train/grad_norm": self.now.norm_sum / self.crops.steps_per_epoch,
            "train/lr": self._rate,
        }
        if rank() == 0:
            with self._measuring():
                values |= self.after_epoch(epoch)
        self.now.loss_sum = self.now.norm_sum = 0.0
        self.now.history.append(values)
        for line in self.alarms(self.now.history) if rank() == 0 else ():
            print(f"warning: {self.name}: {line}, after epoch {epoch} (step {self.now.step})", flush=True)
        self.observer.log_epoch(values)

    def _measuring(self) -> AbstractContextManager[None]:
        """Run blocks uncompiled inside: what is measured has other shapes, and is not worth compiling for."""
        return torch.compiler.set_stance("force_eager") if self.settings.compile else nullcontext()

    def _end_if_dead(self, total: int) -> None:
        """Decide in the first process whether the training ends here. All processes follow."""
        with self._measuring():
            dead = rank() == 0 and self.now.step < total and self.is_dead(self.now)
        self.model.train()
        self.now.ended_early = bool(agree(int(dead)))
        if self.now.ended_early:
            self.now.train_flops = self.now.train_flops // total * self.now.step

    def _save_due(self, epoch_ends: bool, total: int) -> bool:
        """Return whether to save now.

        The last step is always saved. Other states are due at the end of an epoch and after `run.save_every_s`. They
        are skipped if saving takes more than `SAVE_SHARE` of the time, and while the last one is still being written.
        """
        if rank() > 0:  # the clock of the first process decides: it saves
            return False
        since = time.monotonic() - self._saved_at
        worthwhile = not self._saver.is_busy and self._saver.took <= SAVE_SHARE * since
        return self.now.step == total or (worthwhile and (epoch_ends or since >= self.settings.save_every_s))

    def _save(self, stops: bool = False) -> None:
        """Begin to save a resume state. Raise `Diverged` if a weight is not finite.

        The training goes on while the state is written. It waits for the one before. Where it `stops` and waited for a
        slow one, that one is the last.
        """
        waits = self._saver.is_busy
        self._settle()
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise Diverged(
                f"{self.name}: a weight stopped being finite by step {self.now.step}, learning rate {self._rate:.3g}: "
                f"lower the learning rate of {self.name}{replay_hint(self.name, self.now.step - 1)}{self._kept()}"
            )
        if stops and waits and self._saver.took > SLOW_S:
            return
        if rank() == 0:
            self._saver.save(self._state())
        self._saved_at, self._saved_step = time.monotonic(), self.now.step

    def _settle(self) -> None:
        """Wait until nothing is being written. Report a full disk and continue."""
        try:
            written = self._saver.settled()
        except OSError as e:
            if not is_disk_full(e):
                raise
            if not self._disk_full:
                print(f"{self.name}: disk full, no state is saved; the last one stays, training goes on", flush=True)
            self._disk_full = True
        else:
            self._disk_full = self._disk_full and not written

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progression": vars(self.now),
            "precision": str(self.precision),
        }

    def _stop(self, interruption: Interruption) -> None:
        of_step = "" if self._saved_step == self.now.step else f" of step {self._saved_step}"
        saved = "the disk is full, its last state is older" if self._disk_full else f"its state{of_step} is saved"
        reason = interruption.reason or "another process"
        raise Interrupted(
            f"{self.name}: stopped at step {self.now.step} ({reason}), {saved}: run the same command again to go on",
            128 + interruption.signal,
        )

    def _resume(self) -> None:
        state = send_state(self.store.read() if rank() == 0 else None, self.device)
        if state is None:
            return
        self.model.load_state_dict(state["model"], strict=True)
        # an optimizer keeps what it is given, and what the first process has lies in a file
        moments = state["optimizer"] if rank() else copied(state["optimizer"], self.device)
        self.optimizer.load_state_dict(moments)
        self.now = Progression(**state["progression"])
        if rank() == 0:
            print(f"{self.name}: going on from step {self.now.step}", flush=True)
            if state["precision"] != str(self.precision):
                print(f"warning: {self.name} ran in {state['precision']}, it now runs in {self.precision}", flush=True)
