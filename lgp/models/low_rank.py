"""Low-rank updates of attention weights (LoRA, Hu et al. 2022, arXiv 2106.09685), merged at the end."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRankQkv(nn.Linear):
    """A layer of queries, keys and values (3D, D) with low-rank updates of queries and values.

    The weight in effect is W + (alpha / rank) · B A, with one pair of A (`down`) and B (`up`) for the queries and one
    for the values. The keys have none. W and the bias do not learn. A starts as in LoRA's code, B at 0, so the layer
    starts as the plain one.

    A deep copy is a layer of its own. A momentum copy averages A and B each, not their product. W is the same in both.
    (torch's `parametrize` gives copies one class, from which the first merge takes the weight of all.)
    """

    def __init__(self, plain: nn.Linear, rank: int, alpha: float) -> None:
        """Take over weight and bias of the plain layer. Its parameters stop learning.

        Args:
            plain: weight (3D, D), rows in the order queries, keys, values.
            rank: of an update, r.
            alpha: scales the updates by alpha / r.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = plain.in_features, plain.out_features, alpha / rank
        self.weight, self.bias = plain.weight, plain.bias
        plain.requires_grad_(False)
        self.down = nn.Parameter(plain.weight.new_empty(2, rank, plain.in_features))
        self.up = nn.Parameter(plain.weight.new_zeros(2, plain.out_features // 3, rank))
        for down in self.down:
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return queries, keys and values (B, N, 3D) of tokens (B, N, D)."""
        queries, keys, values = super().forward(tokens).chunk(3, dim=-1)
        of_queries, of_values = F.linear(tokens, self.down.flatten(0, 1)).chunk(2, dim=-1)
        queries = queries + self.scale * F.linear(of_queries, self.up[0])
        values = values + self.scale * F.linear(of_values, self.up[1])
        return torch.cat([queries, keys, values], dim=-1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the plain layer with the weight in effect."""
        weight = self.weight.clone()
        for part, update in zip(weight.chunk(3)[::2], self.scale * self.up @ self.down, strict=True):
            part += update
        plain = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=weight.device, dtype=weight.dtype
        )
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        return plain


def merge_low_rank(model: nn.Module) -> None:
    """Replace every `LowRankQkv` in a model by its plain layer, also in momentum copies."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LowRankQkv):
                setattr(parent, name, child.merged())
