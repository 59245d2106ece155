"""A contrastive batch in parts (gradient cache: Gao et al. 2021, arXiv 2101.06983).

A contrastive loss compares each image with all others of its batch, so gradients of parts cannot be summed. The encoder
sees each image alone. All parts pass it without a graph first, and only their features stay. Heads and loss take the
whole batch, BatchNorm included. Then each part passes the encoder again, with the graph, and takes the gradients of its
features back. Gradients are those of the whole batch. Activations of the encoder are held for one part at a time. The
price is one more forward pass of the encoder.

torch's checkpointing of each part does just that. It also restores precision in the second pass, and the random state
of the CPU, and of CUDA where a part is a tensor. Pre-training draws nothing there.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lgp.models.vit import View

T = TypeVar("T")


def encode_in_parts(encode: Callable[[View], Tensor], view: View, parts: int) -> Tensor:
    """Return what `encode` gives for a view, (…, B, D). It is called with equal parts of the images.

    Args:
        encode: features of a view, which do not depend on the other images of it.
        view: of B images.
        parts: their number divides B; 1: all images at once, whose activations are kept.
    """
    if parts == 1:
        return encode(view)

    def features(images: Tensor, ids_keep: Tensor | None) -> Tensor:
        return encode(View(images, ids_keep))

    images = view.images.chunk(parts)
    ids_keep = [None] * parts if view.ids_keep is None else view.ids_keep.chunk(parts)
    found = [checkpoint(features, *of_part, use_reentrant=False) for of_part in zip(images, ids_keep, strict=True)]
    return torch.cat(found, dim=-2)


def mean_in_parts(loss_of: Callable[[T], Tensor], parts: Sequence[T]) -> Tensor:
    """Return the mean loss of equal parts of a batch. Of several parts, only the images are kept for the second pass.

    Args:
        loss_of: the mean of losses of single images.
        parts: of the batch.
    """
    if len(parts) == 1:
        return loss_of(parts[0])
    return torch.stack([checkpoint(loss_of, part, use_reentrant=False) for part in parts]).mean()
