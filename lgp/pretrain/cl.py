"""Contrastive learning (MoCo v3, Chen et al. 2021): the baseline arm `cl`, and the objective of the graft."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lgp.compute.randomness import Stream, generator, seeded
from lgp.data.loading import Batch, CropDataset
from lgp.data.views import ColorJitter, color_jitter
from lgp.models.contrastive import Contrastive, build_contrastive
from lgp.models.mae import random_masking
from lgp.models.vit import View, build_encoder, init_encoder_as_moco
from lgp.params.pretrain import TrainingParams
from lgp.pretrain.arm import LossOf, Objective, Pretrained, Session, fit_arm
from lgp.pretrain.head_warmup import HeadWarmup
from lgp.training.optimizer import peak_rate

BETAS = (0.9, 0.999)  # AdamW's defaults: MoCo v3 names none


def pretrain_cl(session: Session) -> Pretrained:
    """Train the contrastive baseline from scratch. `contrastive.objective` is MoCo v3 by default."""
    params = session.params
    with seeded(params.seed, "cl/init"):
        encoder = build_encoder(params.model, params.data)
        init_encoder_as_moco(encoder)
        model = build_contrastive(encoder, params.contrastive)
    rate = peak_rate(params.cl.base_lr, params.cl.batch_size)
    rates = {name: rate for name, _ in model.named_parameters()}
    return contrast("cl", model, rates, params.cl, session)


def contrastive_loss_of(name: str, model: Contrastive, total: int, session: Session) -> LossOf:
    """Return the function from a batch to its loss. The loss is of the first two crops of each image.

    Args:
        name: of the stage. Each stage has its own random draws.
        model: encoder and heads.
        total: number of training steps.
        session: images and parameters.
    """
    data, params = session.data, session.params
    views, mask_ratio = params.contrastive.views, params.contrastive.mask_ratio
    patches = model.encoder.patch_embed.num_patches

    def ids_keep(batch: Batch, view: int) -> Tensor | None:
        if not mask_ratio:
            return None
        noise = torch.rand(batch.size, patches, generator=generator(params.seed, f"{name}/mask", batch.step, view))
        return random_masking(noise[batch.rows].to(batch.crops.device), mask_ratio)[0]

    def jitter_of(batch: Batch, view: int) -> ColorJitter:
        rng = generator(params.seed, f"{name}/colours", batch.step, view)
        return ColorJitter.draw(batch.size, view, views, rng)[batch.rows]

    def loss_of(batch: Batch) -> Tensor:
        # one call for both views of all images: half the calls, each with twice the work
        crops = batch.crops[:, :2].transpose(0, 1).flatten(0, 1).float() / 255
        images = color_jitter(crops, ColorJitter.cat([jitter_of(batch, 0), jitter_of(batch, 1)]), views)
        view1, view2 = (View(half, ids_keep(batch, v)) for v, half in enumerate(data.normalize(images).chunk(2)))
        loss: Tensor = model(view1, view2, min(batch.step / total, 1.0))
        return loss

    return loss_of


@dataclass(frozen=True)
class Penalty:
    """What is added to the loss of every step.

    Attributes:
        value: computes it.
        regularized: parameters that it regularises towards their start. They may move less than others.
    """

    value: Callable[[], Tensor | float] = lambda: 0.0
    regularized: frozenset[str] = frozenset()


def contrast(
    name: str,
    model: Contrastive,
    rates: Mapping[str, float],
    stage: TrainingParams,
    session: Session,
    penalty: Penalty = Penalty(),
    head_epochs: int = 0,
) -> Pretrained:
    """Train a contrastive model as the stage `name`.

    Args:
        name: `cl` or `graft`.
        model: encoder and heads.
        rates: parameter name → peak learning rate.
        stage: epochs, batch, warm-up and weight decay.
        session: images, parameters, resume states and observer.
        penalty: added to the loss of every step.
        head_epochs: of the heads on the frozen encoder before.
    """
    contrastive, crops = _loss_and_batches(name, model, stage, stage.epochs, session)

    def loss_of(batch: Batch) -> Tensor:
        return contrastive(batch) + penalty.value()

    warmup = None
    if head_epochs:
        warmup = HeadWarmup(head_epochs, *_loss_and_batches(f"{name}/heads", model, stage, head_epochs, session))
    objective = Objective(name, model, loss_of, crops, penalty.regularized, warmup)
    return fit_arm(objective, rates, BETAS, stage, session)


def _loss_and_batches(
    name: str, model: Contrastive, stage: TrainingParams, epochs: int, session: Session
) -> tuple[LossOf, CropDataset]:
    """Return the loss and the batches of a contrastive training, which draws from streams of its own name."""
    stream = Stream(session.params.seed, name)
    crops = CropDataset(session.data, session.params.contrastive.views, 2, stage.batch_size, stream)
    return contrastive_loss_of(name, model, epochs * crops.steps_per_epoch, session), crops
