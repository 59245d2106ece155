"""Momentum contrast for vision transformers (MoCo v3, Chen et al. 2021, arXiv 2104.02057)."""

import copy
import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def mlp(layers: int, width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Build a head of MoCo v3: linear layers without bias, each followed by BatchNorm, ReLU between.

    The last BatchNorm has no affine parameters.
    """
    modules: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        wide_in, wide_out = width_in if i == 0 else hidden, width_out if last else hidden
        modules += [nn.Linear(wide_in, wide_out, bias=False), nn.BatchNorm1d(wide_out, affine=not last)]
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE in MoCo v3's scaling, 2T · cross-entropy (algorithm 1): the i-th key is the i-th query's positive.

    Args:
        queries: (B, D), of any length.
        keys: (B, D), the momentum encoder's, of any length.
        temperature: T.

    Returns:
        The mean loss of the batch.
    """
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    logits = queries @ keys.T / temperature
    return F.cross_entropy(logits, torch.arange(len(queries), device=queries.device)) * (2 * temperature)


def momentum_at(progress: float, base: float) -> float:
    """Return the momentum at `progress` in [0, 1] of the training: from `base` to 1 along a half cosine."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * progress)) / 2


class MoCo(nn.Module):
    """An encoder with projector and predictor, and its momentum copy without predictor."""

    def __init__(
        self,
        encoder: VisionTransformer,
        projector_hidden: int,
        projector_dim: int,
        predictor_hidden: int,
        temperature: float,
        freeze_patch_embed: bool,
    ) -> None:
        """Put heads on `encoder` and copy it; the patch embedding stays as it is where frozen (section 4.1)."""
        super().__init__()
        self.temperature = temperature
        if freeze_patch_embed:
            encoder.patch_embed.requires_grad_(False)
        self.encoder = encoder
        self.projector = mlp(3, encoder.embed_dim, projector_hidden, projector_dim)
        self.predictor = mlp(2, projector_dim, predictor_hidden, projector_dim)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def update_momentum_encoder(self, momentum: float) -> None:
        """Move the momentum encoder: θ_k ← m · θ_k + (1 - m) · θ_q, over all parameters."""
        average = get_ema_multi_avg_fn(momentum)
        keys = [*self.momentum_encoder.parameters(), *self.momentum_projector.parameters()]
        queries = [*self.encoder.parameters(), *self.projector.parameters()]
        average([k.detach() for k in keys], [q.detach() for q in queries], 0)

    def forward(self, view1: Tensor, view2: Tensor, momentum: float) -> Tensor:
        """Return the symmetric loss of two views (B, C, H, W), after moving the momentum encoder."""
        query1 = self.predictor(self.projector(self.encoder(view1)))
        query2 = self.predictor(self.projector(self.encoder(view2)))
        with torch.no_grad():
            self.update_momentum_encoder(momentum)
            key1 = self.momentum_projector(self.momentum_encoder(view1))
            key2 = self.momentum_projector(self.momentum_encoder(view2))
        return contrastive_loss(query1, key2, self.temperature) + contrastive_loss(query2, key1, self.temperature)
