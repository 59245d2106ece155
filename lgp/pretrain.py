"""What every pre-training shares: from an objective and its batches to an arm's folder."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.checkpoint import StateStore, save_encoder, save_tensors
from lgp.data.loading import StepCrops
from lgp.data.prepared import Prepared
from lgp.device import choose_device
from lgp.engine import Observer, Progression, Trainer
from lgp.errors import LgpError, check_disk_space
from lgp.optim import adamw, parameter_groups, warmup_cosine
from lgp.params import Params, TrainingParams
from lgp.stage import StageRun, encoder_digest

HEADS = "heads.safetensors"
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
        loss_of: (crops (B, V, C, S, S) uint8, step) → scalar loss.
        crops: the batch of each step.
    """

    name: str
    model: nn.Module
    encoder: VisionTransformer
    loss_of: Callable[[Tensor, int], Tensor]
    crops: StepCrops


@dataclass(frozen=True)
class Pretrained:
    """A finished pre-training, before it is written."""

    model: nn.Module
    encoder: VisionTransformer
    progression: Progression


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
    """
    params, model, crops = session.params, objective.model, objective.crops
    check_batches(len(crops.data.pretraining_ids), params)
    device = choose_device(params.run)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    check_disk_space(session.store.folder, DISK_BYTES_PER_PARAMETER * sum(p.numel() for p in model.parameters()))
    model.to(device)
    optimizer = adamw(parameter_groups(model, rates, stage.weight_decay), betas)
    steps = stage.epochs * crops.steps_per_epoch
    warmup_steps = min(round(stage.warmup_epochs * crops.steps_per_epoch), steps - 1)
    schedule = warmup_cosine(optimizer, steps, warmup_steps)
    trainer = Trainer(
        objective.name,
        model,
        objective.loss_of,
        crops,
        optimizer,
        schedule,
        stage.epochs,
        device,
        params.run,
        session.store,
        session.observer,
    )
    progression = trainer.fit()
    return Pretrained(model.cpu(), objective.encoder, progression)


def check_batches(images: int, params: Params) -> None:
    """Raise `LgpError` where any arm's batch is larger than the training part, before the first arm trains."""
    for name in ("mim", "cl", "graft"):
        batch_size = getattr(params, name).batch_size
        if batch_size > images:
            raise LgpError(
                f"{name}.batch_size {batch_size} is larger than the {images} images of the training part: "
                "choose at most that"
            )


def publish_arm(run: StageRun, folder: Path, metrics: Path, result: Pretrained, data: Prepared) -> None:
    """Write what every arm leaves, and log its encoder as a model of the registry.

    Args:
        run: the stage.
        folder: of the arm: gets `encoder/`, the other modules as `heads.safetensors`, and `curves.csv`.
        metrics: the metric file.
        result: the finished pre-training.
        data: the images it was trained on.
    """
    out, params, history = run.out(folder), run.params, result.progression.history
    heads = {
        name: tensor.detach().contiguous()
        for name, tensor in result.model.state_dict().items()
        if not name.startswith(("encoder.", "momentum_"))
    }
    save_tensors(heads, out / HEADS)
    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "train/loss", "train/lr"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "epoch": int(row["epoch"])} for row in history)
    values = {
        "train/loss": round(history[-1]["train/loss"], 6),
        "train/pflop": round(result.progression.train_flops / 1e15, 9),
        "encoder_parameters": sum(p.numel() for p in result.encoder.parameters()),
    }
    save_encoder(out / "encoder", result.encoder, params.model, params.data, data, run.provenance | {"metrics": values})
    run.write_metrics(metrics, values)
    run.tracker.will_register(folder / "encoder", run.spec.arm, encoder_digest(out / "encoder"))
