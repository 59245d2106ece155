"""The contrastive models by objective: heads of MoCo v3, SimCLR, VICReg, SwAV or MIM-Refiner on an encoder."""

from timm.models.vision_transformer import VisionTransformer

from lgp.models.moco import MaskedKeysMoCo, MoCo, OneSidedMoCo
from lgp.models.refine import Refine
from lgp.models.simclr import SimCLR
from lgp.models.swav import SwAV
from lgp.models.vicreg import VICReg
from lgp.params.pretrain import ContrastiveParams

Contrastive = MoCo | SimCLR | VICReg | SwAV | Refine
MASKED = {"queries": MoCo, "queries_and_keys": MaskedKeysMoCo, "one_sided": OneSidedMoCo}


def build_contrastive(encoder: VisionTransformer, params: ContrastiveParams, images: int | None = None) -> Contrastive:
    """Put the heads of `objective` on an encoder. With `freeze_patch_embed`, freeze the patch embedding.

    A frozen random patch embedding keeps MoCo v3 stable (section 4.1).

    Args:
        encoder: to train.
        params: of the objective.
        images: number of training images, which bounds the queue of `refine`; None: any.
    """
    if params.freeze_patch_embed:
        encoder.patch_embed.requires_grad_(False)
    hidden, dim, temperature = params.projector_hidden, params.projector_dim, params.temperature
    if params.objective == "simclr":
        return SimCLR(encoder, hidden, dim, temperature)
    if params.objective == "vicreg":
        return VICReg(encoder, hidden, dim, params.vicreg)
    if params.objective == "swav":
        return SwAV(encoder, hidden, dim, temperature, params.swav)
    if params.objective == "refine":
        return Refine(encoder, hidden, dim, params.predictor_hidden, temperature, params.refine, images)
    return MASKED[params.masked](encoder, hidden, dim, params.predictor_hidden, temperature, params.momentum)
