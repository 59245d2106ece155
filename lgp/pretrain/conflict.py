"""Gradient conflict between MIM and CL, the observation behind the graft (LGP, section 3.1).

MIM and CL move the same weights in different directions. The measurement has two steps. First the heads of both losses
are trained while the encoder is frozen. The gradients are then those of fitted heads, not of random heads. Then the
gradients of both losses are computed on the same images and weights, and compared block by block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgp.compute.device import choose_device
from lgp.compute.intact import reading
from lgp.compute.randomness import Stream, seeded
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, contrastive_crops
from lgp.errors import LgpError
from lgp.features.extraction import Running, extract
from lgp.features.knn import knn_predict
from lgp.models.contrastive import build_contrastive
from lgp.models.encoder_folder import check_encoder_fits, images_for, load_encoder
from lgp.models.files import encoder_digest
from lgp.models.joint import Joint
from lgp.models.roles import Role, encoder_roles
from lgp.models.vit import freeze_pooling, tokens_by_block
from lgp.params.file import Params
from lgp.params.pretrain import TrainingParams
from lgp.pretrain.arm import Objective, Session, fit_arm
from lgp.pretrain.cl import BETAS, contrastive_loss_of
from lgp.pretrain.mim import build_mae, masked_loss_of
from lgp.training.optimizer import peak_rate

COLUMNS = ["block", "batch", "cosine", "mim_norm", "cl_norm"]
PAPER_RATES = (1.5e-5, 1.5e-4)  # of the lower and the upper blocks, per 256 images
KNN_IMAGES = 10_000  # of the training part: k-NN per block is a guide, not a result


def measure_conflict(session: Session, start: Path) -> pd.DataFrame:
    """Compare the gradients of MIM and CL at the encoder in the folder `start`.

    Args:
        session: images, parameters, resume states and observer (of the heads' training).
        start: encoder folder of any arm.

    Returns:
        A row per part (`embed`, `block0` …, `norm`) and batch: the cosine of the two gradients, in [-1, 1], and the
        norm of each.

    Raises:
        LgpError: the encoder has other dimensions than the parameters, or the heads did not train on it.
    """
    params, settings = session.params, session.params.conflict
    check_encoder_fits(start, params.model, params.data)
    session = replace(session, data=images_for(start, session.data))
    with seeded(params.seed, "conflict/init"):
        encoder = load_encoder(start)
        freeze_pooling(encoder)
        contrastive = build_contrastive(encoder, params.contrastive, len(session.data.pretraining_ids))
        mae = build_mae(encoder, params.mim)
    model = Joint(contrastive, mae)
    crops = contrastive_crops(session.data, params.contrastive, settings.batch_size, Stream(params.seed, "conflict"))
    steps = settings.head_epochs * crops.steps_per_epoch
    contrastive_loss = contrastive_loss_of("conflict", contrastive, crops, steps, session)
    masked_loss = masked_loss_of("conflict/mim", mae, session)

    def both(batch: Batch) -> Tensor:
        return contrastive_loss(batch) + masked_loss(batch)

    weights = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    for weight in weights.values():
        weight.requires_grad_(False)
    rate = peak_rate(settings.base_lr, settings.batch_size)
    training = TrainingParams(
        epochs=settings.head_epochs, batch_size=settings.batch_size, warmup_epochs=0, weight_decay=0
    )
    rates = {name: rate for name, _ in model.named_parameters()}
    heads = fit_arm(Objective("conflict", model, both, crops), rates, BETAS, training, session)
    if heads.checks.faults:
        raise LgpError(f"conflict: the heads did not train on the encoder in {start}: {heads.checks.said}")
    for weight in weights.values():
        weight.requires_grad_(True)
    device = choose_device(params.run)
    model.to(device).train()
    print(f"conflict: heads fitted, now the gradients of {settings.batches} batches", flush=True)
    rows, roles = [], encoder_roles(encoder)
    for number in range(settings.batches):
        batch = crops.batch(steps + number, crops[steps + number].to(device))
        of_mim = _gradients(masked_loss(batch), weights, roles)
        of_cl = _gradients(contrastive_loss(batch), weights, roles)
        for part, gradient in of_mim.items():
            cosine = F.cosine_similarity(gradient, of_cl[part], dim=0)
            rows.append([part, number, float(cosine), float(gradient.norm()), float(of_cl[part].norm())])
    return pd.DataFrame(rows, columns=COLUMNS)


def _gradients(loss: Tensor, weights: dict[str, nn.Parameter], roles: Mapping[str, Role]) -> dict[str, Tensor]:
    """Return the gradient of a loss as one vector per part of the encoder."""
    parts: dict[str, list[Tensor]] = {}
    for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        parts.setdefault(roles[name].part, []).append(gradient.flatten())
    return {part: torch.cat(gradients) for part, gradients in parts.items()}


def knn_by_block(folder: Path, data: LabelledImages, params: Params) -> list[float]:
    """Return k-NN accuracy on val, in percent, of the mean token after each block of the encoder in `folder`."""
    data = images_for(folder, data)
    device = choose_device(params.run)
    encoder = load_encoder(folder).to(device).eval()

    def encode(images: Tensor) -> Tensor:
        return torch.cat([t.mean(dim=1) for t in tokens_by_block(encoder, images.to(device))], dim=1)

    train = data.ids("train")
    train = train[:: math.ceil(len(train) / KNN_IMAGES)]
    val = data.ids("val")
    running = Running.of(params.run, device)
    of_splits = (extract(encode, data, ids, running=running) for ids in (train, val))
    x_train, x_val = (np.split(features, len(encoder.blocks), axis=1) for features in of_splits)
    k, temperature, classes = params.linear.knn_k, params.linear.knn_temperature, len(data.classes)
    predicted = [
        knn_predict(of_train, data.labels[train], of_val, classes, k, temperature)
        for of_train, of_val in zip(x_train, x_val, strict=True)
    ]
    return [round(100 * float((p == data.labels[val]).mean()), 2) for p in predicted]


@dataclass(frozen=True)
class Suggestion:
    """How many lower blocks to keep for a graft, and why.

    Attributes:
        lower_blocks: the suggestion.
        by_conflict: number of blocks below the fall of the median cosine; None where it does not fall with depth.
        by_knn: number of blocks up to and including the one with the best features.
        cosines: median cosine per block.
    """

    lower_blocks: int
    by_conflict: int | None
    by_knn: int
    cosines: list[float]


def suggest_cut(conflict: pd.DataFrame, knn: list[float]) -> Suggestion:
    """Suggest how many lower blocks to keep.

    The cut by conflict splits the blocks' median cosines into the two levels that fit them best (least squares).
    Conflict grows with depth where the upper level is lower by more than three standard errors over the batches. This
    cut is then the suggestion. Otherwise the cut by k-NN is: keep the blocks up to and including the one with the best
    k-NN accuracy. The last block is never kept.

    Args:
        conflict: of `measure_conflict`.
        knn: accuracy per block of the encoder to graft on, two blocks or more.

    Raises:
        LgpError: the conflict was measured in another number of blocks, or there are fewer than two.
    """
    names = [f"block{i}" for i in range(len(knn))]
    blocks = conflict[conflict["block"].str.startswith("block")]
    by_batch = blocks.pivot(index="batch", columns="block", values="cosine")
    if set(by_batch.columns) != set(names) or len(knn) < 2:
        raise LgpError(
            f"the conflict was measured in {len(by_batch.columns)} blocks, the encoder has {len(knn)} (two or more are "
            "needed): run `lgp conflict` again"
        )
    cosines = by_batch[names].median().to_numpy()

    def misfit(cut: int) -> float:
        return float(sum(((part - part.mean()) ** 2).sum() for part in (cosines[:cut], cosines[cut:])))

    cut = min(range(1, len(cosines)), key=misfit)
    fall = by_batch[names[:cut]].to_numpy().mean(axis=1) - by_batch[names[cut:]].to_numpy().mean(axis=1)
    falls = bool(fall.mean() > 3 * fall.std(ddof=1) / math.sqrt(len(fall)))
    by_knn = min(int(np.argmax(knn)) + 1, len(knn) - 1)
    return Suggestion(cut if falls else by_knn, cut if falls else None, by_knn, [float(c) for c in cosines])


def rates_for(lower_blocks: int, depth: int, low: float, high: float) -> list[float]:
    """Return `graft.stage_lr.base_lrs` that give the lower blocks the rate `low`, the others `high`."""
    group = math.gcd(lower_blocks, depth)
    return [low] * (lower_blocks // group) + [high] * ((depth - lower_blocks) // group)


def read_conflict(path: Path, encoder: Path) -> pd.DataFrame:
    """Read a table of `measure_conflict`; raise `LgpError` where it is missing or of another encoder."""
    arm = encoder.parent.name
    if not path.exists():
        raise LgpError(f"no {path}: run `lgp conflict {arm}` first")
    with reading(path, f"run `lgp conflict {arm}`"):
        table = pd.read_csv(path).astype({"batch": int, "cosine": float})[["encoder", "block", "batch", "cosine"]]
    if set(table["encoder"]) != {encoder_digest(encoder)}:
        raise LgpError(f"{path} was measured on another encoder of {arm}: run `lgp conflict {arm}` again")
    return table


def advice(found: Suggestion, depth: int) -> list[str]:
    """Write a suggestion as lines of text, with the parameters to set."""
    cut = found.lower_blocks
    why = "conflict grows there" if found.by_conflict else "conflict does not grow with depth, the features decide"
    return [
        f"keep the lowest {cut} of {depth} blocks ({why}; features are best after {found.by_knn})",
        f"  graft.stage_lr.base_lrs: {rates_for(cut, depth, *PAPER_RATES)}  # the paper's rates",
        f"  or graft.freeze, graft.l1, graft.scratch_end with lower_blocks: {cut}",
    ]
