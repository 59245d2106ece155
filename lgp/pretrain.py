"""What every pre-training shares: from an objective and its batches to an arm's folder."""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.arms import CURVES, HEADS, METRICS, TRAINED
from lgp.checkpoint import PROVENANCE, StateStore, save_encoder, save_tensors
from lgp.data.loading import Batch, StepCrops
from lgp.data.prepared import Prepared
from lgp.device import choose_device, choose_precision, place
from lgp.distributed import WorkerDone, joined, rank, world_size
from lgp.engine import Observer, Progression, Trainer
from lgp.errors import LgpError, check_disk_space
from lgp.evaluate.features import class_token_of, extract
from lgp.online import OnlineKnn
from lgp.optim import adamw, parameter_groups, warmup_cosine
from lgp.params import Params, TrainingParams
from lgp.stage import StageRun, encoder_digest
from lgp.trained import movement, spread, weights_of

LossOf = Callable[[Batch], Tensor]

SHOWN_IMAGES = 1024  # whose features are looked at after the training
# two resume states of weight, momentum copy and two moments; the result here, in DVC's cache and in MLflow
DISK_BYTES_PER_PARAMETER = 4 * (2 * 4 + 3)


@dataclass(frozen=True)
class Session:
    """What a pre-training is given: images, parameters, where its resume states are, who is told of epochs."""

    data: Prepared
    params: Params
    store: StateStore
    observer: Observer


@dataclass(frozen=True)
class Objective:
    """What is trained.

    Attributes:
        name: the stage.
        model: with everything that has parameters, on the CPU.
        encoder: the part of it to keep, the one that the gradient trains.
        loss_of: batch → scalar loss, the mean over its images.
        crops: the batch of each step.
        held: parameters that the loss itself keeps near their start, so that they may hardly move.
    """

    name: str
    model: nn.Module
    encoder: VisionTransformer
    loss_of: LossOf
    crops: StepCrops
    held: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Pretrained:
    """A finished pre-training, before it is written.

    Attributes:
        model: with its heads, on the CPU.
        encoder: the part of it to keep.
        progression: epochs and compute.
        trained: the metrics of `lgp.trained`.
        computed: on what and how, which moves the last digits.
    """

    model: nn.Module
    encoder: VisionTransformer
    progression: Progression
    trained: Mapping[str, float]
    computed: Mapping[str, Any]


def fit_arm(
    objective: Objective,
    rates: Mapping[str, float],
    betas: tuple[float, float],
    stage: TrainingParams,
    session: Session,
) -> Pretrained:
    """Train an objective on the device of the parameters, as every arm is trained.

    Args:
        objective: what to train.
        rates: parameter name → peak learning rate.
        betas: AdamW's.
        stage: epochs, warm-up and weight decay.
        session: images, parameters, resume states and observer.

    Raises:
        LgpError: a batch is larger than the data or cannot be shared, the disk is full, the loss stopped being
            finite, another process was lost, or the model did not train.
        Interrupted: something asked to stop; the state is saved.
        WorkerDone: in all processes but the first, at the end.
    """
    params, model, crops = session.params, objective.model, objective.crops
    device = choose_device(params.run)
    precision = choose_precision(params.run, device, params.model.width)
    steps = stage.epochs * crops.steps_per_epoch
    with joined(objective.name, device):
        batch_sizes = {objective.name: crops.batch_size, **_batch_sizes(params)}
        check_batches(batch_sizes, len(crops.ids))
        check_shares(batch_sizes, world_size(), params.run.accumulate)
        check_disk_space(session.store.folder, DISK_BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters()))
        crops.share(rank(), world_size())
        crops.data.keep_decoded(params.run.decoded_gib * 2**30)
        initial = weights_of(model)
        place(model, device, precision)
        optimizer = adamw(parameter_groups(model, rates, stage.weight_decay), betas)
        warmup_steps = min(round(stage.warmup_epochs * crops.steps_per_epoch), steps - 1)
        progression = Trainer(
            objective.name,
            model,
            objective.loss_of,
            crops,
            optimizer,
            warmup_cosine(optimizer, steps, warmup_steps),
            stage.epochs,
            device,
            precision,
            params.run,
            session.store,
            session.observer,
            OnlineKnn(objective.encoder, crops.data, device, params.run.online_knn).after_epoch,
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
    trained = movement(model, initial, rates, steps, optimizer, objective.held)
    # spread over all, for sources come class by class
    shown = crops.ids[:: math.ceil(len(crops.ids) / SHOWN_IMAGES)]
    trained |= spread(extract(class_token_of(objective.encoder, device), crops.data, shown))
    return Pretrained(model.cpu(), objective.encoder, progression, trained, computed)


def _batch_sizes(params: Params) -> dict[str, int]:
    trained = [arm for arm in TRAINED if arm in params.arms or arm in ("mim", "cl", "graft")]
    return {arm: getattr(params, arm).batch_size for arm in trained}


def check_batches(batch_sizes: Mapping[str, int], images: int) -> None:
    """Raise `LgpError` where a batch is larger than the training part: of any arm, before the first one trains."""
    for name, batch_size in batch_sizes.items():
        if batch_size > images:
            raise LgpError(
                f"{name}.batch_size {batch_size} is larger than the {images} images of the training part: "
                "choose at most that"
            )


def check_shares(batch_sizes: Mapping[str, int], processes: int, accumulate: Mapping[str, int]) -> None:
    """Raise `LgpError` where a batch cannot be cut into equal parts, one or more a process."""
    for name, batch_size in batch_sizes.items():
        parts = processes * accumulate.get(name, 1)
        if batch_size % parts:
            raise LgpError(
                f"{name}.batch_size {batch_size} cannot be cut into {parts} equal parts ({processes} processes, "
                f"run.accumulate {accumulate.get(name, 1)}): choose a multiple of {parts}"
            )


def publish_arm(run: StageRun, folder: Path, result: Pretrained, data: Prepared, starts: Sequence[Path] = ()) -> None:
    """Write what every arm leaves, and log its encoder as a model of the registry.

    Args:
        run: the stage.
        folder: of the arm: gets `encoder/`, the other modules as `heads.safetensors`, `curves.csv`, `metrics.json`.
        result: the finished pre-training.
        data: the images it was trained on.
        starts: encoder folders that it started from; their compute counts into `train/pflop_total`.
    """
    out, params, history = run.out(folder), run.params, result.progression.history
    heads = {
        name: tensor.detach().contiguous()
        for name, tensor in result.model.state_dict().items()
        if not any(part == "encoder" or part.startswith("momentum_") for part in name.split("."))
    }
    save_tensors(heads, out / HEADS)
    with (out / CURVES).open("w", newline="") as file:
        # without the online k-NN, which a key of `run` sets
        writer = csv.DictWriter(file, ["epoch", "train/loss", "train/lr"], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "epoch": int(row["epoch"])} for row in history)
    pflop = result.progression.train_flops / 1e15
    values = {
        "train/loss": round(history[-1]["train/loss"], 6),
        "train/pflop": round(pflop, 9),
        "train/pflop_total": round(pflop + sum(_pflop_of(start) for start in starts), 9),
        **result.trained,
        "encoder_parameters": sum(p.numel() for p in result.encoder.parameters()),
    }
    provenance = run.provenance | {"computed": dict(result.computed), "metrics": values}
    save_encoder(out / "encoder", result.encoder, params.model, params.data, data, provenance)
    run.write_metrics(out / METRICS, values)
    run.tracker.will_register(folder / "encoder", run.spec.arm, encoder_digest(out / "encoder"))


def _pflop_of(encoder: Path) -> float:
    """Return the compute that went into an encoder, 0 where nobody counted it (an imported one)."""
    provenance = json.loads((encoder / PROVENANCE).read_text())
    return float(provenance["metrics"].get("train/pflop_total", 0))
