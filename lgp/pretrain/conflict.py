"""Gradient conflict between MIM and CL, the observation behind the graft (LGP, section 3.1).

MIM and CL move the same weights in different directions. The measurement has two steps. First the heads of both losses
are trained while the encoder is frozen. The gradients are then those of fitted heads, not of random heads. Then the
gradients of both losses are computed on the same images and weights, and compared block by block.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lgp.compute.device import choose_device
from lgp.compute.randomness import Stream, seeded
from lgp.data.loading import Batch, contrastive_crops
from lgp.errors import LgpError
from lgp.models.contrastive import build_contrastive
from lgp.models.encoder_folder import check_encoder_fits, images_for, load_encoder
from lgp.models.joint import Joint
from lgp.models.roles import Role, encoder_roles
from lgp.models.vit import freeze_pooling
from lgp.params.pretrain import TrainingParams
from lgp.pretrain.arm import Objective, Session, fit_arm
from lgp.pretrain.cl import BETAS, contrastive_loss_of
from lgp.pretrain.mim import build_mae, masked_loss_of
from lgp.training.optimizer import peak_rate

COLUMNS = ["block", "batch", "cosine", "mim_norm", "cl_norm"]


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
