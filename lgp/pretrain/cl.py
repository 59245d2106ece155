"""Contrastive learning (MoCo v3, Chen et al. 2021): the baseline arm `cl`, and the objective of the graft."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lgp.compute.randomness import Stream, generator, seeded
from lgp.data.loading import Batch, CropDataset, contrastive_crops
from lgp.data.views import ColorJitter, color_jitter
from lgp.models.contrastive import Contrastive, build_contrastive
from lgp.models.mae import random_masking
from lgp.models.refine import Drawn, Refine
from lgp.models.vit import View, build_encoder, init_encoder_as_moco
from lgp.params.pretrain import SmallViews, TrainingParams, ViewParams
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
        model = build_contrastive(encoder, params.contrastive, len(session.data.pretraining_ids))
    rate = peak_rate(params.cl.base_lr, params.cl.batch_size)
    rates = {name: rate for name, _ in model.named_parameters()}
    return contrast("cl", model, rates, params.cl, session)


def contrastive_loss_of(
    name: str, model: Contrastive, crops: CropDataset, total: int, session: Session, nearest: bool = False
) -> LossOf:
    """Return the function from a batch to its loss. The loss is of the first two crops of each image, and small ones.

    Args:
        name: of the stage. Each stage has its own random draws.
        model: encoder and heads.
        crops: gives the batches.
        total: number of training steps.
        session: images and parameters.
        nearest: whether `refine` takes the nearest neighbour, in place of a drawn one.
    """
    data, params = session.data, session.params
    views, mask_ratio = params.contrastive.views, params.contrastive.mask_ratio
    patches, refines = model.encoder.patch_embed.num_patches, isinstance(model, Refine)

    def ids_keep(batch: Batch, view: int) -> Tensor | None:
        if not mask_ratio:
            return None
        noise = torch.rand(batch.size, patches, generator=generator(params.seed, f"{name}/mask", batch.step, view))
        return random_masking(noise[batch.rows].to(batch.crops.device), mask_ratio)[0]

    def drawn(batch: Batch) -> Drawn:
        neighbour = torch.rand(2, batch.size, generator=generator(params.seed, f"{name}/neighbours", batch.step))
        neighbour = torch.zeros_like(neighbour) if nearest else neighbour
        ids, device = torch.from_numpy(crops.ids_of(batch.step)[batch.rows]), batch.crops.device
        return Drawn(ids.to(device), neighbour[:, batch.rows].to(device), total)

    def large_views(batch: Batch) -> Tensor:
        return data.normalize(coloured(batch.crops[:, :2], (0, 1), views, f"{name}/colours", batch, params.seed))

    def small_views(batch: Batch, params_of_small: SmallViews) -> Tensor:
        assert batch.small is not None  # the batches have them where the parameters do
        each, of_small = (0,) * batch.small.shape[1], params_of_small.beside(views)
        return data.normalize(coloured(batch.small, each, of_small, f"{name}/small colours", batch, params.seed))

    def loss_of(batch: Batch) -> Tensor:
        # what colours take on their way is needed for one part at a time
        parts, of_small = batch.split(model.parts), params.contrastive.small_views
        large = _together([large_views(part) for part in parts])
        view1, view2 = (View(images, ids_keep(batch, v)) for v, images in enumerate(large))
        small = None
        if of_small is not None:
            small = _together([small_views(part, of_small) for part in parts])
        loss: Tensor = model(view1, view2, drawn(batch) if refines else min(batch.step / total, 1.0), small)
        return loss

    return loss_of


def _together(parts: list[Tensor]) -> Tensor:
    """Join the views (V, B / parts, …) of all parts of a batch."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def coloured(crops: Tensor, kinds: Sequence[int], views: ViewParams, name: str, batch: Batch, seed: int) -> Tensor:
    """Apply drawn colour operations to V crops of each image, all in one call, which is faster.

    Args:
        crops: (B, V, C, S, S) uint8.
        kinds: V times 0 or 1, for each view its place in `blur_p` and `solarize_p`.
        views: the augmentation.
        name: of the random draws.
        batch: that the crops are of. Operations are drawn for all its images, each view apart.
        seed: of the training.

    Returns:
        (V, B, C, S, S) float in [0, 1].
    """
    drawn = [
        ColorJitter.draw(batch.size, kind, views, generator(seed, name, batch.step, view))[batch.rows]
        for view, kind in enumerate(kinds)
    ]
    flat = crops.transpose(0, 1).flatten(0, 1).float() / 255
    return color_jitter(flat, ColorJitter.cat(drawn), views).unflatten(0, (len(kinds), -1))


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
    model.parts = session.params.run.accumulate.get(name, 1)
    contrastive, crops = _loss_and_batches(name, model, stage, stage.epochs, session)

    def loss_of(batch: Batch) -> Tensor:
        return contrastive(batch) + penalty.value()

    warmup = None
    if head_epochs:
        of_heads = _loss_and_batches(f"{name}/heads", model, stage, head_epochs, session, nearest=True)
        warmup = HeadWarmup(head_epochs, *of_heads)
    objective = Objective(name, model, loss_of, crops, penalty.regularized, warmup)
    return fit_arm(objective, rates, BETAS, stage, session)


def _loss_and_batches(
    name: str, model: Contrastive, stage: TrainingParams, epochs: int, session: Session, nearest: bool = False
) -> tuple[LossOf, CropDataset]:
    """Return the loss and the batches of a contrastive training, which draws from streams of its own name."""
    stream = Stream(session.params.seed, name)
    crops = contrastive_crops(session.data, session.params.contrastive, stage.batch_size, stream)
    return contrastive_loss_of(name, model, crops, epochs * crops.steps_per_epoch, session, nearest), crops
