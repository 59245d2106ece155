"""The paper's controls (LGP, section 3.1): the sum of both losses on one encoder, and MIM on top of CL."""

from pathlib import Path

from torch import Tensor

from lgp.compute.randomness import Stream, seeded
from lgp.data.loading import Batch, CropDataset, contrastive_crops
from lgp.errors import LgpError
from lgp.models.contrastive import build_contrastive
from lgp.models.encoder_folder import check_start, load_encoder
from lgp.models.in_parts import mean_in_parts
from lgp.models.joint import Joint
from lgp.models.vit import build_encoder, freeze_pooling, init_encoder_as_moco
from lgp.pretrain.arm import Objective, Pretrained, Session, fit_arm
from lgp.pretrain.cl import BETAS, contrastive_loss_of
from lgp.pretrain.graft import stage_rates
from lgp.pretrain.mim import BETAS as MIM_BETAS
from lgp.pretrain.mim import build_mae, masked_loss_of
from lgp.training.optimizer import peak_rate


def pretrain_joint(session: Session) -> Pretrained:
    """Train one encoder on L_CL + `mim_weight` · L_MIM from scratch.

    MIM takes the crop of the first contrastive view, before colour jitter. Both losses therefore have the same images
    and weights. Everything else (optimizer, initialisation, frozen patch embedding) is as in `cl`.
    """
    params, joint = session.params, session.params.joint
    if joint is None:
        raise LgpError("there is no section joint in the parameters: add it (the preset digits has one)")
    with seeded(params.seed, "joint/init"):
        encoder = build_encoder(params.model, params.data)
        init_encoder_as_moco(encoder)
        contrastive = build_contrastive(encoder, params.contrastive, len(session.data.pretraining_ids))
        mae = build_mae(encoder, params.mim)
    crops = contrastive_crops(session.data, params.contrastive, joint.batch_size, Stream(params.seed, "joint"))
    contrastive_loss = contrastive_loss_of("joint", contrastive, crops, joint.epochs * crops.steps_per_epoch, session)
    masked_loss = masked_loss_of("joint/mim", mae, session)

    parts = contrastive.parts = params.run.accumulate.get("joint", 1)

    def loss_of(batch: Batch) -> Tensor:
        return contrastive_loss(batch) + joint.mim_weight * mean_in_parts(masked_loss, batch.split(parts))

    model = Joint(contrastive, mae)
    rate = peak_rate(joint.base_lr, joint.batch_size)
    rates = {name: rate for name, _ in model.named_parameters()}
    return fit_arm(Objective("joint", model, loss_of, crops), rates, BETAS, joint, session)


def pretrain_reverse(session: Session, start: Path) -> Pretrained:
    """Continue masked image modelling on the contrastive encoder in the folder `start`, with a new decoder."""
    params, reverse = session.params, session.params.reverse
    if reverse is None:
        raise LgpError("there is no section reverse in the parameters: add it (the preset digits has one)")
    check_start(start, params.model, params.data, session.data)
    with seeded(params.seed, "reverse/init"):
        mae = build_mae(load_encoder(start), params.mim)
        freeze_pooling(mae.encoder)
    crops = CropDataset(session.data, params.mim.views, 1, reverse.batch_size, Stream(params.seed, "reverse"))
    peaks = [peak_rate(lr, reverse.batch_size) for lr in reverse.base_lrs]
    rates = stage_rates(mae.roles(), params.model.depth, peaks)
    objective = Objective("reverse", mae, masked_loss_of("reverse", mae, session), crops)
    return fit_arm(objective, rates, MIM_BETAS, reverse, session)
