"""Multi-crop: small views beside the two large ones (Caron et al. 2020, arXiv 2006.09882, section 3.2).

Small views show less of an image, cost little, and are compared with the large views only. A loss is the mean over all
pairs of a large view and another one.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.models.in_parts import encode_in_parts
from lgp.models.vit import View, features_of_view


def of_views(encode: Callable[[View], Tensor], large: Sequence[View], small: Tensor | None, parts: int) -> list[Tensor]:
    """Return what `encode` gives for each view, (…, B, D): the large ones, then the small ones.

    Args:
        encode: features of a view.
        large: views of the encoder's size.
        small: (n, B, C, s, s), normalised; None: no small views. All are encoded together.
        parts: in which the images of a view are encoded; 1: all at once.
    """
    found = [encode_in_parts(encode, view, parts) for view in large]
    if small is not None:
        found += encode_in_parts(encode, View(small.flatten(0, 1)), parts).chunk(len(small), dim=-2)
    return found


def projections(
    encoder: VisionTransformer, projector: nn.Module, large: Sequence[View], small: Tensor | None, parts: int
) -> list[Tensor]:
    """Return the projections of each view, (B, D): the large ones, then the small ones. BatchNorm sees a view apart.

    The images of a view are encoded in `parts`. The projector takes all of them.
    """
    return [projector(features) for features in of_views(partial(features_of_view, encoder), large, small, parts)]


def mean_over_pairs(loss: Callable[[Tensor, Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """Return the mean of a symmetric loss over the pairs of a large view (the first two) and another one."""
    pairs = [(0, 1), *((large, small) for small in range(2, len(views)) for large in (0, 1))]
    return torch.stack([loss(views[u], views[v]) for u, v in pairs]).mean()


def mean_over_targets(loss: Callable[[int, int], Tensor], views: int) -> Tensor:
    """Return the mean of `loss(target, other)` over the large views (0 and 1) as targets, and all other views."""
    pairs = [(1, 0), (0, 1), *((large, small) for small in range(2, views) for large in (0, 1))]
    return torch.stack([loss(target, other) for target, other in pairs]).mean()
