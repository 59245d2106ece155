"""Momentum contrast for vision transformers (MoCo v3, Chen et al. 2021, arXiv 2104.02057)."""

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.compute.distributed import gather, rank
from lgp.compute.precision import in_single_precision
from lgp.models.averaging import follow
from lgp.models.heads import mlp
from lgp.models.in_parts import encode_in_parts
from lgp.models.multi_crop import mean_over_targets, projections
from lgp.models.roles import PretrainingModel
from lgp.models.vit import View, features_of_view


@in_single_precision
def contrastive_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE in MoCo v3's scaling, 2T · cross-entropy (algorithm 1). Key i is the positive of query i.

    The keys of all processes are the candidates.

    Args:
        queries: (B, D), not normalised.
        keys: (B, D) of the momentum encoder, not normalised, without gradient.
        temperature: T.

    Returns:
        The mean loss of this process's queries.
    """
    queries, keys = F.normalize(queries, dim=1), gather(F.normalize(keys, dim=1))
    logits = queries @ keys.T / temperature
    positives = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return F.cross_entropy(logits, positives) * (2 * temperature)


def momentum_at(progress: float, base: float) -> float:
    """Return the momentum at `progress` in [0, 1] of the training: from `base` to 1 along a half cosine."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * progress)) / 2


class MoCo(PretrainingModel):
    """An encoder with projector and predictor, and momentum copies of the encoder and the projector."""

    def __init__(
        self,
        encoder: VisionTransformer,
        projector_hidden: int,
        projector_dim: int,
        predictor_hidden: int,
        temperature: float,
        momentum: float,
    ) -> None:
        """Put heads on `encoder`, then copy both. `momentum` is the first value. It goes to 1 along a cosine."""
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.encoder = encoder
        self.projector = mlp(3, encoder.embed_dim, projector_hidden, projector_dim)
        self.predictor = mlp(2, projector_dim, predictor_hidden, projector_dim)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def momentum_copies(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return encoder and projector with their copies."""
        return [(self.momentum_encoder, self.encoder), (self.momentum_projector, self.projector)]

    def update_momentum_encoder(self, momentum: float) -> None:
        """Update the momentum encoder and projector: θ_k ← m · θ_k + (1 - m) · θ_q, over all parameters."""
        for copied, learner in self.momentum_copies():
            follow(copied, learner, momentum)

    def queries(self, large: Sequence[View], small: Tensor | None) -> list[Tensor]:
        """Return the queries of each view, (B, D): the large ones, then the small ones (n, B, C, s, s).

        Only visible patches are encoded.
        """
        return [self.predictor(z) for z in projections(self.encoder, self.projector, large, small, self.parts)]

    @torch.no_grad()
    def key(self, view: View) -> Tensor:
        """Return the keys of a view, (B, D), of all its patches."""
        keys: Tensor = self.momentum_projector(self._momentum_features(View(view.images)))
        return keys

    def _momentum_features(self, view: View) -> Tensor:
        return encode_in_parts(partial(features_of_view, self.momentum_encoder), view, self.parts)

    def forward(self, view1: View, view2: View, progress: float, small: Tensor | None = None) -> Tensor:
        """Update the momentum encoder and return the symmetric loss of two large views of each image.

        With small views it is twice the mean over all pairs of a query and the key of another, large view.

        Args:
            view1: of each image.
            view2: of each image.
            progress: in [0, 1] of the training; it sets the momentum.
            small: (n, B, C, s, s), small views of each image.
        """
        queries = self.queries((view1, view2), small)
        self.update_momentum_encoder(momentum_at(progress, self.momentum))
        keys = (self.key(view1), self.key(view2))

        def loss(target: int, other: int) -> Tensor:
            return contrastive_loss(queries[other], keys[target], self.temperature)

        return 2 * mean_over_targets(loss, len(queries))


class MaskedKeysMoCo(MoCo):
    """MoCo v3 on masked views: the keys see the same patches as the queries (`mae_aug` in LGP's released code)."""

    @torch.no_grad()
    def key(self, view: View) -> Tensor:
        """Return the keys of a view, (B, D), of its visible patches."""
        keys: Tensor = self.momentum_projector(self._momentum_features(view))
        return keys


class OneSidedMoCo(MoCo):
    """MoCo v3 with queries of the masked first view and keys of the whole second view (`cmae` in LGP's released code).

    The released code leaves out the final norm of the queries. Here queries pass it, as the keys do.
    """

    def forward(self, view1: View, view2: View, progress: float, small: Tensor | None = None) -> Tensor:
        """Update the momentum encoder and return the mean loss of the first views' queries, and of small views'."""
        queries = self.queries((view1,), small)
        self.update_momentum_encoder(momentum_at(progress, self.momentum))
        key2 = self.key(view2)
        return torch.stack([contrastive_loss(query, key2, self.temperature) for query in queries]).mean()
