"""The training that all arms share: it takes an objective and its batches, and returns a trained model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lgp.compute.device import choose_device
from lgp.compute.distributed import joined, rank, world_size
from lgp.compute.launch import WorkerDone
from lgp.compute.precision import choose_precision, place
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.data.storage import Images
from lgp.errors import check_disk_space
from lgp.features.extraction import class_token_of, extract
from lgp.features.online_knn import OnlineKnn
from lgp.models.roles import PretrainingModel
from lgp.params.file import Params
from lgp.params.pretrain import TrainingParams
from lgp.pretrain.batch_checks import check_batch
from lgp.pretrain.sanity_checks import check_features, check_weights, weights_of
from lgp.training.loop import Epoch, Observer, Progression, Trainer
from lgp.training.optimizer import adamw, parameter_groups, warmup_cosine, whole_warmup_steps
from lgp.training.resume_states import StateStore

LossOf = Callable[[Batch], Tensor]

CHECKED_IMAGES = 1024  # images whose features are checked after the training
# two resume states (each: weight, momentum copy, two moments), and three copies of the result (here, DVC, MLflow)
DISK_BYTES_PER_PARAMETER = 4 * (2 * 4 + 3)


@dataclass(frozen=True)
class Session:
    """The inputs of a pre-training.

    Attributes:
        data: the images, without labels.
        params: the sections that the stage reads.
        store: where resume states are kept.
        observer: logs epochs.
        labelled: the same images with labels, for the online k-NN; None where no labels are prepared.
    """

    data: Images
    params: Params
    store: StateStore
    observer: Observer
    labelled: LabelledImages | None = None


@dataclass(frozen=True)
class Objective:
    """What is trained, and on what.

    Attributes:
        name: of the stage.
        model: contains every module that has parameters; on the CPU.
        loss_of: batch → scalar loss, the mean over its images.
        crops: gives the batch of each step.
        regularized: parameters that the loss regularises towards their start. They may move less than others.
    """

    name: str
    model: PretrainingModel
    loss_of: LossOf
    crops: CropDataset
    regularized: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pretrained:
    """A finished pre-training, before it is written.

    Attributes:
        model: encoder and heads, on the CPU.
        progression: epochs and compute.
        checks: metrics of the sanity checks.
        computed: device, precision, threads and processes. The last digits of the result depend on them.
    """

    model: PretrainingModel
    progression: Progression
    checks: Mapping[str, float]
    computed: Mapping[str, Any]


def fit_arm(
    objective: Objective,
    rates: Mapping[str, float],
    betas: tuple[float, float],
    stage: TrainingParams,
    session: Session,
) -> Pretrained:
    """Train an objective on the device that `run.device` names. Every arm is trained by this function.

    Args:
        objective: what to train.
        rates: parameter name → peak learning rate.
        betas: of AdamW.
        stage: epochs, warm-up and weight decay.
        session: images, parameters, resume states and observer.

    Raises:
        LgpError: a batch is larger than the data or cannot be divided, the disk is full, the loss is not finite,
            another process was lost, or a sanity check failed.
        Interrupted: the training was asked to stop; its state is saved.
        WorkerDone: at the end, in every process except the first.
    """
    params, model, crops = session.params, objective.model, objective.crops
    device = choose_device(params.run)
    precision = choose_precision(params.run, device, params.model.width)
    steps = stage.epochs * crops.steps_per_epoch
    with joined(objective.name, device):
        check_batch(objective.name, crops.batch_size, len(crops.ids), world_size(), params.run.accumulate)
        check_disk_space(session.store.folder, DISK_BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters()))
        crops.shard(rank(), world_size())
        crops.data.keep_decoded(params.run.decoded_gib * 2**30)
        initial = weights_of(model)
        place(model, device, precision)
        optimizer = adamw(parameter_groups(model, rates, stage.weight_decay), betas)
        warmup_steps = whole_warmup_steps(stage.warmup_epochs, crops.steps_per_epoch, steps)
        progression = Trainer(
            name=objective.name,
            model=model,
            loss_of=objective.loss_of,
            crops=crops,
            optimizer=optimizer,
            schedule=warmup_cosine(optimizer, steps, warmup_steps),
            epochs=stage.epochs,
            device=device,
            precision=precision,
            settings=params.run,
            store=session.store,
            observer=session.observer,
            after_epoch=_online_knn(objective, session, device),
        ).fit()
        computed = {
            "device": device.type,
            "precision": str(precision),
            "threads": torch.get_num_threads(),
            "processes": world_size(),
            "compiled": params.run.compile,
        }
        if rank() > 0:
            raise WorkerDone
    checks = check_weights(model, initial, rates, steps, optimizer, objective.regularized)
    # evenly spaced over all images, because sources are sorted by class
    checked = crops.ids[:: math.ceil(len(crops.ids) / CHECKED_IMAGES)]
    checks |= check_features(extract(class_token_of(model.encoder, device), crops.data, checked))
    return Pretrained(model.cpu(), progression, checks, computed)


def _online_knn(objective: Objective, session: Session, device: torch.device) -> Callable[[int], Epoch]:
    """Return the function that measures online k-NN after an epoch. Without labels it measures nothing."""
    if session.labelled is None:
        return lambda _epoch: {}
    return OnlineKnn(objective.model.encoder, session.labelled, device, session.params.run.online_knn).after_epoch
