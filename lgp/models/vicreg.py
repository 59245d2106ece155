"""Variance-invariance-covariance regularisation (VICReg, Bardes et al. 2022, arXiv 2105.04906)."""

import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.compute.distributed import gather
from lgp.compute.precision import in_single_precision
from lgp.models.heads import mlp
from lgp.models.multi_crop import mean_over_pairs, projections
from lgp.models.roles import PretrainingModel
from lgp.models.vit import View
from lgp.params.pretrain import VicregWeights

EPS = 1e-4  # section 4.1
GAMMA = 1.0  # target of the standard deviation of each dimension, section 4.1


def variance_term(z: Tensor) -> Tensor:
    """Return the hinge on the standard deviation of each dimension of (N, D), averaged (equations 1 and 2)."""
    return F.relu(GAMMA - (z.var(dim=0) + EPS).sqrt()).mean()


def covariance_term(z: Tensor) -> Tensor:
    """Sum the squared covariances between different dimensions of (N, D), divided by D (equations 3 and 4)."""
    z = z - z.mean(dim=0)
    squares = (z.T @ z / (len(z) - 1)).square()
    return (squares.sum() - squares.diagonal().sum()) / z.shape[1]


@in_single_precision
def vicreg_loss(z1: Tensor, z2: Tensor, weights: VicregWeights) -> Tensor:
    """Return the weighted sum of the three terms over the batch of all processes (algorithm 1).

    The invariance term is the mean over images and dimensions, as in algorithm 1. Equation 5 sums over dimensions.

    Args:
        z1: (B, D) expanded embeddings of the first views, not normalised.
        z2: (B, D) of the second views of the same images.
        weights: weights of the terms.
    """
    z1, z2 = gather(z1), gather(z2)
    invariance = F.mse_loss(z1, z2)
    variance = variance_term(z1) + variance_term(z2)
    covariance = covariance_term(z1) + covariance_term(z2)
    return weights.invariance * invariance + weights.variance * variance + weights.covariance * covariance


class VICReg(PretrainingModel):
    """An encoder with an expander of three layers. The last layer has no BatchNorm."""

    def __init__(
        self, encoder: VisionTransformer, expander_hidden: int, expander_dim: int, weights: VicregWeights
    ) -> None:
        """Put the expander on `encoder`."""
        super().__init__()
        self.weights = weights
        self.encoder = encoder
        self.projector = mlp(3, encoder.embed_dim, expander_hidden, expander_dim, last_norm=False)

    def forward(self, view1: View, view2: View, progress: float, small: Tensor | None = None) -> Tensor:
        """Return the loss of two large views of each image, and small ones (n, B, C, s, s).

        It is the same at any `progress`.
        """
        z = projections(self.encoder, self.projector, (view1, view2), small, self.parts)
        return mean_over_pairs(lambda z1, z2: vicreg_loss(z1, z2, self.weights), z)
