"""The contrastive models by objective: heads of MoCo v3, SimCLR, VICReg, SwAV or MIM-Refiner on an encoder."""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.models.moco import MaskedKeysMoCo, MoCo, OneSidedMoCo
from lgp.models.refine import Drawn, Refine
from lgp.models.simclr import SimCLR
from lgp.models.swav import SwAV
from lgp.models.vicreg import VICReg
from lgp.models.vit import View
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


def loss_of_views(
    model: nn.Module, view1: View, view2: View, small: Tensor | None, progress: float, drawn: Drawn
) -> Tensor:
    """Return the loss of a batch.

    Args:
        model: any contrastive model.
        view1: large view of each image.
        view2: another one.
        small: (n, B, C, s, s), small views of each image, where there are some.
        progress: in [0, 1] of the training.
        drawn: images of the batch, for `refine`.
    """
    loss: Tensor = model(view1, view2, drawn if isinstance(model, Refine) else progress, small)
    return loss
