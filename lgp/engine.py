"""The one training loop: counted batches in, loss per epoch out, stoppable and resumable at any step."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from lgp.checkpoint import StateStore
from lgp.data.loading import StepCrops, loader
from lgp.errors import LgpError, is_disk_full
from lgp.params import RunParams
from lgp.progress import Progress

CHECK_EVERY = 20  # steps between looks at the loss: each look makes a GPU wait
SAVE_SHARE = 0.02  # of the time, at most, goes into saving at epoch ends

Epoch = dict[str, float]


class Observer(Protocol):
    """Who wants to know about epochs: experiment tracking."""

    def log_epoch(self, values: Epoch) -> None:
        """Take `epoch` (from 1), `train/loss` (its mean) and `train/lr` (the highest rate of its last step)."""


@dataclass
class Progression:
    """How far a training has come: what a resume state holds beside model and optimizer."""

    step: int = 0
    loss_sum: float = 0.0  # over the steps of the running epoch
    train_flops: int = 0  # of the whole training, counted on its first step
    history: list[Epoch] = field(default_factory=list)


@dataclass
class Trainer:
    """A model, how to compute its loss, and the batches to train it on.

    Attributes:
        name: the stage, for messages.
        model: on `device`; its state, buffers included, is what a resume state holds.
        loss_of: (crops (B, V, C, S, S) uint8 on the device, step) → scalar loss.
        crops: the batch of each step.
        optimizer: over the model's trainable parameters.
        schedule: sets the learning rates of a step.
        epochs: passes over the images.
        device: where the model is.
        settings: the `run` section.
        store: where resume states are kept; its newest state, if any, is where `fit` goes on.
        observer: told of every epoch, after a resume also of those before it.
    """

    name: str
    model: nn.Module
    loss_of: Callable[[Tensor, int], Tensor]
    crops: StepCrops
    optimizer: Optimizer
    schedule: CosineLRScheduler
    epochs: int
    device: torch.device
    settings: RunParams
    store: StateStore
    observer: Observer

    def fit(self) -> Progression:
        """Train to the end, from the newest resume state or from the start.

        Raises:
            LgpError: the loss stopped being finite; says step and rate, the last good state is kept.
        """
        self.now = Progression()
        self._resume()
        for values in self.now.history:
            self.observer.log_epoch(values)
        self._unchecked: list[tuple[Tensor, float]] = []
        self._saved_at, self._save_took = time.monotonic(), 0.0
        self._disk_full = False
        per_epoch, total = self.crops.steps_per_epoch, self.epochs * self.crops.steps_per_epoch
        progress = Progress(
            self.name, self.epochs, per_epoch, self.crops.batch_size, self.now.step, self.settings.print_every_s
        )
        batches = loader(self.crops, self.now.step, total, self.settings.workers, pin=self.device.type == "cuda")
        self.model.train()
        with progress.showing():
            for batch in batches:
                self._step(batch.to(self.device, non_blocking=True), total)
                epoch_ends = self.now.step % per_epoch == 0
                save = self._save_due(epoch_ends) or self.now.step == total
                if epoch_ends or save or self.now.step % CHECK_EVERY == 0:
                    progress.step(self.now.step, self._check_losses())
                if epoch_ends:
                    self._end_epoch()
                if save:
                    self._save()
        return self.now

    def _step(self, batch: Tensor, total: int) -> None:
        step = self.now.step
        self.schedule.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        if step == 0:
            with FlopCounterMode(display=False) as counter:
                loss = self._backward(batch, step)
            self.now.train_flops = counter.get_total_flops() * total
        else:
            loss = self._backward(batch, step)
        self.optimizer.step()
        self._unchecked.append((loss, self._rate))
        self.now.step += 1

    def _backward(self, batch: Tensor, step: int) -> Tensor:
        loss = self.loss_of(batch, step)
        loss.backward()
        return loss.detach()

    @property
    def _rate(self) -> float:
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def _check_losses(self) -> float | None:
        """Read the losses since the last look and return the newest; raise at the first that is not finite."""
        if not self._unchecked:
            return None
        values = torch.stack([loss for loss, _ in self._unchecked]).tolist()
        first = self.now.step - len(values)
        for i, (value, (_, rate)) in enumerate(zip(values, self._unchecked, strict=True)):
            if not math.isfinite(value):
                raise LgpError(
                    f"{self.name}: the loss is {value} at step {first + i}, learning rate {rate:.3g}: lower the "
                    f"learning rate of {self.name} or lengthen its warm-up{self._kept()}"
                )
        self._unchecked.clear()
        self.now.loss_sum += math.fsum(values)
        return float(values[-1])

    def _kept(self) -> str:
        return f"; the last good state is kept in {self.store.folder}" if self.store.has_state() else ""

    def _end_epoch(self) -> None:
        values = {
            "epoch": float(len(self.now.history) + 1),
            "train/loss": self.now.loss_sum / self.crops.steps_per_epoch,
            "train/lr": self._rate,
        }
        self.now.loss_sum = 0.0
        self.now.history.append(values)
        self.observer.log_epoch(values)

    def _save_due(self, epoch_ends: bool) -> bool:
        """Whether the interval is over, or an epoch is and saving would still be a small share of the time."""
        since = time.monotonic() - self._saved_at
        return since >= self.settings.save_every_s or (epoch_ends and self._save_took <= SAVE_SHARE * since)

    def _save(self) -> None:
        """Save a resume state, unless a weight is not finite; a full disk is told and training goes on."""
        started = time.monotonic()
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise LgpError(
                f"{self.name}: a weight stopped being finite by step {self.now.step}, learning rate {self._rate:.3g}: "
                f"lower the learning rate of {self.name}{self._kept()}"
            )
        try:
            self.store.save(self._state())
        except OSError as e:
            if not is_disk_full(e):
                raise
            if not self._disk_full:
                print(f"{self.name}: disk full, states are not saved; the last one stays, training goes on", flush=True)
            self._disk_full = True
        else:
            self._disk_full = False
        self._saved_at = time.monotonic()
        self._save_took = self._saved_at - started

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progression": vars(self.now),
        }

    def _resume(self) -> None:
        state = self.store.load()
        if state is None:
            return
        self.model.load_state_dict(state["model"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.now = Progression(**state["progression"])
        print(f"{self.name}: going on from step {self.now.step}", flush=True)
