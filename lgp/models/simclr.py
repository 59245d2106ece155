"""A simple framework for contrastive learning (SimCLR, Chen et al. 2020, arXiv 2002.05709)."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.compute.distributed import gather, rank
from lgp.compute.precision import in_single_precision
from lgp.models.heads import mlp
from lgp.models.multi_crop import mean_over_pairs, projections
from lgp.models.roles import PretrainingModel
from lgp.models.vit import View


@in_single_precision
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Return the normalised temperature-scaled cross-entropy (equation 1).

    Each of 2N views has one positive and 2N - 2 negatives. The views of all processes are candidates.

    Args:
        z1: (B, D) projections of the first views, not normalised.
        z2: (B, D) of the second views of the same images.
        temperature: τ.

    Returns:
        The mean loss of this process's 2B views.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    anchors, candidates = torch.cat([z1, z2]), torch.cat([gather(z1), gather(z2)])
    n = len(candidates) // 2
    first = torch.arange(len(z1), device=z1.device) + rank() * len(z1)
    itself, positives = torch.cat([first, first + n]), torch.cat([first + n, first])
    similarity = anchors @ candidates.T / temperature
    similarity = similarity.scatter(1, itself[:, None], float("-inf"))  # a view is not its own candidate
    return F.cross_entropy(similarity, positives)


class SimCLR(PretrainingModel):
    """An encoder with a projector of two layers."""

    def __init__(
        self, encoder: VisionTransformer, projector_hidden: int, projector_dim: int, temperature: float
    ) -> None:
        """Put the projector on `encoder`."""
        super().__init__()
        self.temperature = temperature
        self.encoder = encoder
        self.projector = mlp(2, encoder.embed_dim, projector_hidden, projector_dim)

    def forward(self, view1: View, view2: View, progress: float, small: Tensor | None = None) -> Tensor:
        """Return the loss of two large views of each image, and small ones (n, B, C, s, s).

        It is the same at any `progress`.
        """
        z = projections(self.encoder, self.projector, (view1, view2), small, self.parts)
        return mean_over_pairs(lambda z1, z2: nt_xent(z1, z2, self.temperature), z)
