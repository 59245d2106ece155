"""Replay: a training runs up to one of its steps, repeats it, and says what was seen. It writes and logs nothing.

The steps before it start from the newest resume state that is not later, or from the start. Batches and random choices
are counted, so they are those of the training itself.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lgp.compute.interruption import Interrupted
from lgp.data.loading import Batch
from lgp.errors import LgpError
from lgp.training.loop import Epoch, Progression, Trainer
from lgp.training.resume_states import EarlierStates

SHOWN_PARAMETERS = 5  # those with the largest gradients


@dataclass(frozen=True)
class Seen:
    """What was seen of a step.

    Attributes:
        training: its name. The warm-up of the heads is a training of its own.
        step: of the training, from 0.
        loss: of the whole batch.
        grad_norm: of all gradients together, before they are clipped.
        rate: the highest learning rate.
        images: id and path of each image of the batch.
        inputs_finite: whether the images are finite as the encoder gets them.
        bad_weight: the first weight that is not finite before the step's update, None if all are.
        bad_module: the first module whose output is not finite, None if all are.
        bad_gradients: the first step of the replay whose norm of all gradients is not finite, None if all are.
        grad_norms: norm of the gradient of each parameter. Those that are not finite come first, then the largest.
    """

    training: str
    step: int
    loss: float
    grad_norm: float
    rate: float
    images: list[tuple[int, str]]
    inputs_finite: bool
    bad_weight: str | None
    bad_module: str | None
    bad_gradients: int | None
    grad_norms: dict[str, float]

    def rows(self) -> list[list[str]]:
        """Write all but the images as rows of a table: what, and its value."""
        largest = list(self.grad_norms.items())[:SHOWN_PARAMETERS]
        return [
            ["loss", f"{self.loss:.6g}"],
            ["norm of all gradients", f"{self.grad_norm:.6g}"],
            ["highest learning rate", f"{self.rate:.3g}"],
            ["images as the encoder gets them", "finite" if self.inputs_finite else "not finite"],
            ["first weight that is not finite", _or_none(self.bad_weight)],
            ["first module whose output is not finite", _or_none(self.bad_module)],
            ["first step whose gradients are not finite", _or_none(self.bad_gradients)],
            *([f"norm of the gradient of {name}", f"{norm:.6g}"] for name, norm in largest),
        ]


def _or_none(found: str | int | None) -> str:
    return "none" if found is None else str(found)


class Replayed(Exception):  # noqa: N818 - no error
    """Ends a training at the step that is repeated."""

    def __init__(self, seen: Seen) -> None:
        """Keep what was seen."""
        super().__init__(f"step {seen.step} of {seen.training}")
        self.seen = seen


@dataclass(frozen=True)
class Replay:
    """The replay of a step.

    Attributes:
        name: of the training.
        step: to repeat, from 0.
        steps: of the whole training.

    Raises:
        LgpError: the training has no such step.
    """

    name: str
    step: int
    steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.step < self.steps:
            raise LgpError(
                f"--replay {self.step} is no step of {self.name}, which has {self.steps:,}: choose one from 0 to "
                f"{self.steps - 1}"
            )

    def fit(self, trainer: Trainer) -> Progression:
        """Train up to the step, in place of `Trainer.fit`. A training of another name before it runs to its end.

        Blocks are not compiled, and nothing is measured after an epoch.

        Raises:
            Replayed: at the step, before the weights change. It comes earlier at a step whose loss is not finite: no
                later step tells more.
            Interrupted: a stop was requested.
        """
        last = self.step if trainer.name == self.name else None
        watched = replace(
            trainer,
            settings=trainer.settings.model_copy(update={"compile": False}),
            store=EarlierStates(trainer.store, math.inf if last is None else last),
            observer=_Nobody(),
            clip_norm=None,
            after_epoch=lambda _epoch: {},
            is_dead=lambda _now: False,
        )
        watch = _Watch(watched, last, trainer.clip_norm)
        watched.loss_of = watch.loss_of
        try:
            with watch.listening():
                return watched.fit()
        except Interrupted as e:
            raise Interrupted(f"{self.name}: the replay was stopped, nothing was written", e.exit_code) from None


class _Nobody:
    """An observer that takes no notice."""

    def log_epoch(self, values: Epoch) -> None:
        """Take nothing."""


@dataclass
class _Watch:
    """Looks at each step of a training between its gradients and its update.

    Attributes:
        trainer: does not clip gradients.
        last: the step at which it ends; None: at the training's end.
        clip_norm: to which gradients are clipped after they were looked at.
    """

    trainer: Trainer
    last: int | None
    clip_norm: float | None
    step: int = -1
    bad_gradients: int | None = None
    losses: list[Tensor] = field(default_factory=list)  # of the parts of the step's batch
    inputs: list[Tensor] = field(default_factory=list)  # whether each is finite
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)  # module, and whether its output is finite

    def __post_init__(self) -> None:
        self._loss_of = self.trainer.loss_of

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the modules and the optimizer during the block."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        handles = [optimizer.register_step_pre_hook(self._before_update)]
        for name, module in model.named_modules():
            if name:  # the output of the whole model is its loss
                handles.append(module.register_forward_hook(partial(self._note, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, or of a part of it, and keep it."""
        if batch.step != self.step:
            self.step = batch.step
            for kept in (self.losses, self.inputs, self.outputs):
                kept.clear()
        loss = self._loss_of(batch)
        self.losses.append(loss.detach())
        return loss

    def _note(self, name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if name.endswith("patch_embed.proj"):  # small views pass it too
            self.inputs.append(given[0].isfinite().all())
        if isinstance(output, Tensor):
            self.outputs.append((name, output.detach().isfinite().all()))

    def _before_update(self, *_: Any) -> None:
        learning = {name: p for name, p in self.trainer.model.named_parameters() if p.grad is not None}
        norm = get_total_norm([p.grad for p in learning.values() if p.grad is not None])
        loss = torch.stack(self.losses).mean()
        if self.bad_gradients is None and not norm.isfinite():
            self.bad_gradients = self.step
        if self.step == self.last or not loss.isfinite():
            raise Replayed(self._seen(loss, norm, learning))
        if self.clip_norm is not None:
            clip_grads_with_norm_(learning.values(), self.clip_norm, norm)

    def _seen(self, loss: Tensor, norm: Tensor, learning: dict[str, nn.Parameter]) -> Seen:
        crops, parameters = self.trainer.crops, self.trainer.model.named_parameters()
        norms = {name: float(p.grad.norm()) for name, p in learning.items() if p.grad is not None}
        return Seen(
            training=self.trainer.name,
            step=self.step,
            loss=float(loss),
            grad_norm=float(norm),
            rate=float(max(group["lr"] for group in self.trainer.optimizer.param_groups)),
            images=[(i, crops.data.paths[i]) for i in crops.ids_of(self.step).tolist()],
            inputs_finite=all(self.inputs),
            bad_weight=next((name for name, p in parameters if not p.isfinite().all()), None),
            bad_module=next((name for name, finite in self.outputs if not finite), None),
            bad_gradients=self.bad_gradients,
            grad_norms=dict(sorted(norms.items(), key=lambda named: (math.isfinite(named[1]), -named[1]))),
        )
