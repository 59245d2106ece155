"""The contrastive models by objective: heads of MoCo v3, SimCLR or VICReg on an encoder."""

from timm.models.vision_transformer import VisionTransformer

from lgp.models.moco import MaskedKeysMoCo, MoCo, OneSidedMoCo
from lgp.models.simclr import SimCLR
from lgp.models.vicreg import VICReg
from lgp.params.pretrain import ContrastiveParams

Contrastive = MoCo | SimCLR | VICReg
MASKED = {"queries": MoCo, "queries_and_keys": MaskedKeysMoCo, "one_sided": OneSidedMoCo}


def build_contrastive(encoder: VisionTransformer, params: ContrastiveParams) -> Contrastive:
    """Put the heads of `objective` on an encoder. With `freeze_patch_embed`, freeze the patch embedding.

    A frozen random patch embedding keeps MoCo v3 stable (section 4.1).
    """
    if params.freeze_patch_embed:
        encoder.patch_embed.requires_grad_(False)
    hidden, dim, temperature = params.projector_hidden, params.projector_dim, params.temperature
    if params.objective == "simclr":
        return SimCLR(encoder, hidden, dim, temperature)
    if params.objective == "vicreg":
        return VICReg(encoder, hidden, dim, params.vicreg)
    return MASKED[params.masked](encoder, hidden, dim, params.predictor_hidden, temperature, params.momentum)
