"""Swapped assignments between views (SwAV, Caron et al. 2020, arXiv 2006.09882).

A view predicts to which prototypes another view of the same image is assigned. The assignment of a batch uses all
prototypes equally. There is no momentum encoder and no queue.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.compute.distributed import gather, rank
from lgp.compute.precision import in_single_precision
from lgp.models.heads import mlp
from lgp.models.multi_crop import mean_over_targets, projections
from lgp.models.roles import PretrainingModel
from lgp.models.vit import View
from lgp.params.pretrain import SwavParams


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assign images to prototypes, softly and evenly (equations 3 to 5; Sinkhorn-Knopp).

    The result maximises the agreement with the scores plus `epsilon` times its entropy, where every prototype gets the
    same mass.

    Args:
        scores: (N, K) cosines of the images of all processes to the prototypes.
        epsilon: weight of the entropy; smaller is harder.
        iterations: of the scaling of prototypes and images in turn. Images come last.

    Returns:
        (N, K), the probabilities of each image.
    """
    logarithm = scores / epsilon
    for _ in range(iterations):  # in logarithms: no exponential vanishes
        logarithm = logarithm - logarithm.logsumexp(dim=0, keepdim=True)
        logarithm = logarithm.log_softmax(dim=1)
    return logarithm.exp()


@in_single_precision
def swapped_loss(z: list[Tensor], prototypes: Tensor, temperature: float, params: SwavParams) -> Tensor:
    """Return the mean cross-entropy of all swapped predictions (equation 2, with small views: section 3.2).

    The assignments of each large view, the first two, are predicted by every other view.

    Args:
        z: (B, D) projections of each view, not normalised.
        prototypes: (K, D), not normalised.
        temperature: of the predictions.
        params: of the assignments.

    Returns:
        The mean loss of this process's images.
    """
    prototypes = F.normalize(prototypes, dim=1)
    scores = [F.normalize(of_view, dim=1) @ prototypes.T for of_view in z]
    own = slice(rank() * len(z[0]), (rank() + 1) * len(z[0]))
    targets = [sinkhorn(gather(s.detach()), params.epsilon, params.iterations)[own] for s in scores[:2]]
    return mean_over_targets(lambda u, v: F.cross_entropy(scores[v] / temperature, targets[u]), len(z))


class SwAV(PretrainingModel):
    """An encoder with a projector of two layers, and prototypes. The projector's last layer has no BatchNorm."""

    def __init__(
        self,
        encoder: VisionTransformer,
        projector_hidden: int,
        projector_dim: int,
        temperature: float,
        params: SwavParams,
    ) -> None:
        """Put the projector and the prototypes on `encoder`."""
        super().__init__()
        self.temperature, self.params = temperature, params
        self.encoder = encoder
        self.projector = mlp(2, encoder.embed_dim, projector_hidden, projector_dim, last_norm=False)
        self.prototypes = nn.Linear(projector_dim, params.prototypes, bias=False)

    def forward(self, view1: View, view2: View, progress: float, small: Tensor | None = None) -> Tensor:
        """Return the loss of two large views of each image, and small ones (n, B, C, s, s).

        The prototypes get no gradient at the first `progress`, in [0, 1] of the training.
        """
        z = projections(self.encoder, self.projector, (view1, view2), small, self.parts)
        prototypes = self.prototypes.weight
        if progress < self.params.frozen:
            prototypes = prototypes.detach() + 0 * prototypes  # gradients of 0, which every process can average
        return swapped_loss(z, prototypes, self.temperature, self.params)
