"""Contrastive learning: the baseline (MoCo v3, Chen et al. 2021), and what the graft continues with."""

from collections.abc import Callable, Mapping

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.data.loading import Batch, StepCrops
from lgp.data.views import Colours, photometric
from lgp.models.mae import random_masking
from lgp.models.moco import MoCo
from lgp.models.simclr import SimCLR
from lgp.models.vicreg import VICReg
from lgp.models.vit import View, build_encoder, init_encoder_as_moco
from lgp.optim import peak_rate
from lgp.params import ContrastiveParams, TrainingParams
from lgp.pretrain import LossOf, Objective, Pretrained, Session, fit_arm
from lgp.randomness import generator, seeded

BETAS = (0.9, 0.999)  # MoCo v3 names none: AdamW's own

Contrastive = MoCo | SimCLR | VICReg


def pretrain_cl(session: Session) -> Pretrained:
    """Train contrastively from scratch, by MoCo v3 unless told otherwise: the contrastive baseline."""
    params = session.params
    with seeded(params.seed, "cl/init"):
        encoder = build_encoder(params.model, params.data)
        init_encoder_as_moco(encoder)
        model = build_contrastive(encoder, params.contrastive)
    rate = peak_rate(params.cl.base_lr, params.cl.batch_size)
    rates = {name: rate for name, _ in model.named_parameters()}
    return contrast("cl", model, rates, params.cl, session)


def build_contrastive(encoder: VisionTransformer, params: ContrastiveParams) -> Contrastive:
    """Put the heads of `objective` on an encoder; positions stay fixed, the patch embedding where asked.

    A random patch embedding, frozen, is what keeps MoCo v3 stable (section 4.1).
    """
    encoder.pos_embed.requires_grad_(False)
    if params.freeze_patch_embed:
        encoder.patch_embed.requires_grad_(False)
    hidden, dim, temperature = params.projector_hidden, params.projector_dim, params.temperature
    if params.objective == "simclr":
        return SimCLR(encoder, hidden, dim, temperature)
    if params.objective == "vicreg":
        return VICReg(encoder, hidden, dim, params.vicreg)
    return MoCo(encoder, hidden, dim, params.predictor_hidden, temperature, params.momentum)


def contrastive_loss_of(name: str, model: Contrastive, total: int, session: Session) -> LossOf:
    """Return the loss as a function of a batch, of the first two crops of each image.

    Args:
        name: the stage, which keeps its draws apart from other stages'.
        model: encoder and heads.
        total: steps of the training.
        session: images and parameters.
    """
    data, params = session.data, session.params
    views, mask_ratio = params.contrastive.views, params.contrastive.mask_ratio
    patches = model.encoder.patch_embed.num_patches

    def seen(batch: Batch, view: int) -> Tensor | None:
        if not mask_ratio:
            return None
        noise = torch.rand(batch.size, patches, generator=generator(params.seed, f"{name}/mask", batch.step, view))
        return random_masking(noise[batch.rows].to(batch.crops.device), mask_ratio)[0]

    def colours_of(batch: Batch, view: int) -> Colours:
        rng = generator(params.seed, f"{name}/colours", batch.step, view)
        return Colours.draw(batch.size, view, views, rng)[batch.rows]

    def loss_of(batch: Batch) -> Tensor:
        # both views of all images at once: twice the work for each call
        crops = batch.crops[:, :2].transpose(0, 1).flatten(0, 1).float() / 255
        images = photometric(crops, Colours.cat([colours_of(batch, 0), colours_of(batch, 1)]), views)
        view1, view2 = (View(half, seen(batch, v)) for v, half in enumerate(data.normalize(images).chunk(2)))
        loss: Tensor = model(view1, view2, min(batch.step / total, 1.0))
        return loss

    return loss_of


def _no_penalty() -> float:
    return 0.0


def contrast(
    name: str,
    model: Contrastive,
    rates: Mapping[str, float],
    stage: TrainingParams,
    session: Session,
    penalty: Callable[[], Tensor | float] = _no_penalty,
    held: frozenset[str] = frozenset(),
) -> Pretrained:
    """Train contrastively as the stage `name`.

    Args:
        name: `cl` or `graft`.
        model: encoder and heads.
        rates: parameter name → peak learning rate.
        stage: epochs, batch, warm-up and weight decay.
        session: images, parameters, resume states and observer.
        penalty: added to the loss of every step.
        held: parameters that the penalty keeps near their start, so that they may hardly move.
    """
    crops = StepCrops(session.data, session.params.contrastive.views, 2, stage.batch_size, session.params.seed, name)
    contrastive = contrastive_loss_of(name, model, stage.epochs * crops.steps_per_epoch, session)

    def loss_of(batch: Batch) -> Tensor:
        return contrastive(batch) + penalty()

    return fit_arm(Objective(name, model, model.encoder, loss_of, crops, held), rates, BETAS, stage, session)
