"""The training that all arms share: it takes an objective and its batches, and returns a trained model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lgp.compute.device import choose_device
from lgp.compute.distributed import joined, rank, world_size
from lgp.compute.launch import WorkerDone
from lgp.compute.precision import choose_precision, place
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.data.storage import Images
from lgp.errors import check_disk_space
from lgp.features.extraction import Running, extract, features_of
from lgp.features.online_knn import Measure, OnlineKnn, nothing_more
from lgp.models.roles import PretrainingModel
from lgp.params.file import Params
from lgp.params.pretrain import TrainingParams
from lgp.pretrain.batch_checks import check_batch
from lgp.pretrain.head_warmup import HeadsObserver, HeadWarmup, frozen_encoder, knn_in_head
from lgp.pretrain.sanity_checks import Findings, Weights, check_features, check_loss, check_weights, weights_of
from lgp.training.alarms import fallen
from lgp.training.loop import Observer, Progression, Trainer
from lgp.training.optimizer import adamw, parameter_groups, warmup_cosine, whole_warmup_steps
from lgp.training.resume_states import StateStore

LossOf = Callable[[Batch], Tensor]
Fit = Callable[[Trainer], Progression]

CHECKED_IMAGES = 1024  # images whose features are checked after the training
WATCHED_IMAGES = 256  # images whose features are checked while it goes on
# A training is checked after each tenth of its epochs, at most 10 epochs apart. One of fewer than 10 epochs is checked
# at its end only. A check is a forward pass of `WATCHED_IMAGES`. MIM on digits (1,300 images) takes 0.5 % longer by it.
WATCHES, WATCH_EVERY_EPOCHS = 10, 10
# two resume states (each: weight, momentum copy, two moments), and three copies of the result (here, DVC, MLflow)
DISK_BYTES_PER_PARAMETER = 4 * (2 * 4 + 3)


def _fit(trainer: Trainer) -> Progression:
    return trainer.fit()


@dataclass(frozen=True)
class Session:
    """The inputs of a pre-training.

    Attributes:
        data: the images, without labels.
        params: the sections that the stage reads.
        store: where resume states are kept.
        observer: logs epochs.
        labelled: the same images with labels, for the online k-NN; None where no labels are prepared.
        more: what is measured with the online k-NN.
        fit: runs a training. A replay takes its place.
    """

    data: Images
    params: Params
    store: StateStore
    observer: Observer
    labelled: LabelledImages | None = None
    more: Measure = nothing_more
    fit: Fit = _fit


@dataclass(frozen=True)
class Objective:
    """What is trained, and on what.

    Attributes:
        name: of the stage.
        model: contains every module that has parameters; on the CPU.
        loss_of: batch → scalar loss, the mean over its images.
        crops: gives the batch of each step.
        regularized: parameters that the loss regularises towards their start. They may move less than others.
        head_warmup: trains the heads before, on the frozen encoder; None: they start as they are.
    """

    name: str
    model: PretrainingModel
    loss_of: LossOf
    crops: CropDataset
    regularized: frozenset[str] = frozenset()
    head_warmup: HeadWarmup | None = None


@dataclass(frozen=True)
class Pretrained:
    """A finished pre-training, before it is written.

    Attributes:
        model: encoder and heads, on the CPU.
        progression: epochs and compute.
        checks: measures and faults of the sanity checks.
        computed: device, precision, threads and processes. The last digits of the result depend on them.
    """

    model: PretrainingModel
    progression: Progression
    checks: Findings
    computed: Mapping[str, Any]


def fit_arm(
    objective: Objective,
    rates: Mapping[str, float],
    betas: tuple[float, float],
    stage: TrainingParams,
    session: Session,
) -> Pretrained:
    """Train an objective on the device that `run.device` names. Every arm is trained by this function.

    A training whose sanity checks fail after some epochs ends there.

    Args:
        objective: what to train.
        rates: parameter name → peak learning rate.
        betas: of AdamW.
        stage: epochs, warm-up and weight decay.
        session: images, parameters, resume states and observer.

    Raises:
        LgpError: a batch is larger than the data or cannot be divided, the disk is full, the loss is not finite, or
            another process was lost.
        Interrupted: the training was asked to stop; its state is saved.
        WorkerDone: at the end, in every process except the first.
    """
    params, model, crops = session.params, objective.model, objective.crops
    device = choose_device(params.run)
    precision = choose_precision(params.run, device, params.model.width)
    with joined(objective.name, device):
        check_batch(objective.name, crops.batch_size, len(crops.ids), world_size(), params.run.accumulate)
        check_disk_space(session.store.folder, DISK_BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters()))
        place(model, device, precision)
        fitting = _Fitting(rates, betas, device, precision)
        before, measured = fitting.warm_heads(objective, stage, session)
        initial = weights_of(model)
        trainer = fitting.trainer(objective, stage, session)
        accepted = objective.name in params.run.accept
        checks = Checks(objective, initial, rates, trainer.optimizer, stage, device, accepted)
        trainer.is_dead = checks.find_dead
        if session.labelled is not None:
            running = Running.of(params.run, device)
            knn = OnlineKnn(session.labelled, params.run.online_knn, running, session.more)
            _watch(trainer, objective, knn, device)
        progression = session.fit(trainer)
        computed = {
            "device": device.type,
            "precision": str(precision),
            "threads": torch.get_num_threads(),
            "processes": world_size(),
            "compiled": params.run.compile,
        }
        if rank() > 0:
            raise WorkerDone
    progression.train_flops += before
    found = Findings(measured, {}) | checks.of_all(progression)  # on the device, so before the model leaves it
    return Pretrained(model.cpu(), progression, found, computed)


@dataclass(frozen=True)
class _Fitting:
    """What the trainings of an arm share: peak rates by parameter name, AdamW's betas, device and precision."""

    rates: Mapping[str, float]
    betas: tuple[float, float]
    device: torch.device
    precision: torch.dtype

    def trainer(self, objective: Objective, stage: TrainingParams, session: Session) -> Trainer:
        """Return the training of an objective, on this process's rows of its batches."""
        model, crops, settings = objective.model, objective.crops, session.params.run
        crops.shard(rank(), world_size())
        crops.data.keep_decoded(settings.decoded_gib * 2**30)
        steps = stage.epochs * crops.steps_per_epoch
        optimizer = adamw(parameter_groups(model, self.rates, stage.weight_decay), self.betas)
        return Trainer(
            name=objective.name,
            model=model,
            loss_of=objective.loss_of,
            crops=crops,
            optimizer=optimizer,
            schedule=warmup_cosine(
                optimizer, steps, whole_warmup_steps(stage.warmup_epochs, crops.steps_per_epoch, steps)
            ),
            epochs=stage.epochs,
            device=self.device,
            precision=self.precision,
            settings=settings,
            store=session.store,
            observer=session.observer,
            clip_norm=stage.clip_norm,
        )

    def warm_heads(self, objective: Objective, stage: TrainingParams, session: Session) -> tuple[int, dict[str, float]]:
        """Train the heads on the frozen encoder, where that is asked for.

        The warm-up of their rate is as long a part of their epochs as that of the whole training is of its own.

        Returns:
            The FLOPs of it, and what k-NN finds inside the head after it.
        """
        warmup = objective.head_warmup
        if warmup is None:
            return 0, {}
        heads = Objective(f"{objective.name}-heads", objective.model, warmup.loss_of, warmup.crops)
        share = warmup.epochs / stage.epochs
        of_heads = stage.model_copy(update={"epochs": warmup.epochs, "warmup_epochs": share * stage.warmup_epochs})
        apart = replace(session, store=session.store.part("heads"), observer=HeadsObserver(session.observer))
        with frozen_encoder(objective.model):
            flops = session.fit(self.trainer(heads, of_heads, apart)).train_flops
        if session.labelled is None or rank() > 0:
            return flops, {}
        run = session.params.run
        knn = OnlineKnn(session.labelled, run.online_knn, Running.of(run, self.device))
        return flops, knn_in_head(objective.model, knn, self.device)


@dataclass(frozen=True)
class Checks:
    """The sanity checks of one training."""

    objective: Objective
    initial: Weights
    rates: Mapping[str, float]
    optimizer: Optimizer
    stage: TrainingParams
    device: torch.device
    accepted: bool

    def find_dead(self, now: Progression) -> bool:
        """Return whether a check fails at the end of an epoch, where one is due.

        None is due in the warm-up. None is due for an arm in `run.accept`: it is taken as it is, at its end.
        """
        epoch = len(now.history)
        every = 0 if self.accepted else min(WATCH_EVERY_EPOCHS, self.stage.epochs // WATCHES)
        if not every or epoch % every or epoch <= self.stage.warmup_epochs:
            return False
        return bool(self._after(now, WATCHED_IMAGES).faults)

    def of_all(self, progression: Progression) -> Findings:
        """Check a training that is over. The faults of one that ended early say when it ended."""
        if not progression.ended_early:
            return self._after(progression, CHECKED_IMAGES)
        # the same images as in the check that ended it, so that the same faults are found
        found = self._after(progression, WATCHED_IMAGES)
        faults = found.faults or {"a check failed": "train it anew"}  # another device may find other measures
        when = f"after {len(progression.history)} of {self.stage.epochs} epochs"
        return Findings(found.metrics, {f"{what}, {when}": remedy for what, remedy in faults.items()}, found.warnings)

    def _after(self, now: Progression, images: int) -> Findings:
        model, crops = self.objective.model, self.objective.crops
        moved = check_weights(model, self.initial, self.rates, now.step, self.optimizer, self.objective.regularized)
        losses = [epoch["train/loss"] for epoch in now.history]
        # a penalty on the distance from the start is 0 in the first step, and grows
        loss = Findings() if self.objective.regularized else check_loss(now.first_loss, losses)
        # evenly spaced over all images, because sources are sorted by class
        ids = crops.ids[:: math.ceil(len(crops.ids) / images)]
        features = check_features(extract(features_of(model.published_encoder, self.device), crops.data, ids))
        return moved | loss | features


def _watch(trainer: Trainer, objective: Objective, knn: OnlineKnn, device: torch.device) -> None:
    """Let a training measure online k-NN after its epochs, and warn where it falls by more than chance."""
    trainer.after_epoch = lambda epoch: knn.after_epoch(epoch, objective.model.published_encoder, device)
    trainer.alarms = lambda history: fallen(history, len(knn.val))
