"""Contrastive learning (MoCo v3, Chen et al. 2021): the baseline, and what the graft continues with."""

from collections.abc import Mapping

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.data.loading import StepCrops
from lgp.data.views import photometric
from lgp.models.moco import MoCo, momentum_at
from lgp.models.vit import build_encoder, init_encoder_as_moco
from lgp.optim import peak_rate
from lgp.params import Params, TrainingParams
from lgp.pretrain import Objective, Pretrained, Session, fit_arm
from lgp.randomness import generator, seeded

BETAS = (0.9, 0.999)  # MoCo v3 names none: AdamW's own


def pretrain_cl(session: Session) -> Pretrained:
    """Train MoCo v3 from scratch (Chen et al. 2021): the contrastive baseline."""
    params = session.params
    with seeded(params.seed, "cl/init"):
        encoder = build_encoder(params.model, params.data)
        init_encoder_as_moco(encoder)
        moco = build_moco(encoder, params)
    rate = peak_rate(params.cl.base_lr, params.cl.batch_size)
    rates = {name: rate for name, _ in moco.named_parameters()}
    return contrast("cl", moco, rates, params.cl, session)


def build_moco(encoder: VisionTransformer, params: Params) -> MoCo:
    """Put MoCo v3's heads on an encoder; positions stay fixed."""
    encoder.pos_embed.requires_grad_(False)
    c = params.contrastive
    return MoCo(encoder, c.projector_hidden, c.projector_dim, c.predictor_hidden, c.temperature, c.freeze_patch_embed)


def contrast(name: str, moco: MoCo, rates: Mapping[str, float], stage: TrainingParams, session: Session) -> Pretrained:
    """Train MoCo v3 as the stage `name`.

    Args:
        name: `cl` or `graft`.
        moco: encoder, momentum encoder and heads.
        rates: parameter name → peak learning rate.
        stage: epochs, batch, warm-up and weight decay.
        session: images, parameters, resume states and observer.
    """
    data, params = session.data, session.params
    views = params.contrastive.views
    crops = StepCrops(data, views, 2, stage.batch_size, params.seed, name)
    total = stage.epochs * crops.steps_per_epoch

    def loss_of(batch: Tensor, step: int) -> Tensor:
        rng = generator(params.seed, f"{name}/colours", step)
        view1, view2 = (data.normalize(photometric(batch[:, view].float() / 255, view, views, rng)) for view in (0, 1))
        loss: Tensor = moco(view1, view2, momentum_at(step / total, params.contrastive.momentum))
        return loss

    return fit_arm(Objective(name, moco, moco.encoder, loss_of, crops), rates, BETAS, stage, session)
