"""Nearest-neighbour alignment (NNA) on an encoder of MIM (MIM-Refiner, Alkin et al. 2024, arXiv 2402.10093).

The positive of an image is not its other view, but a near neighbour of that view among earlier images. Negatives are
not swapped, which is the difference from NNCLR. There is no momentum encoder: targets are the encoder's own, without
gradient.
"""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lgp.compute.distributed import gather, rank
from lgp.compute.precision import in_single_precision
from lgp.models.averaging import decay_over, follow
from lgp.models.heads import mlp
from lgp.models.multi_crop import mean_over_targets, of_views
from lgp.models.roles import PretrainingModel
from lgp.models.vit import View, features_of_last_blocks
from lgp.params.pretrain import RefineParams

EMPTY = -1  # the id of a place of the queue that holds nothing yet


@dataclass(frozen=True)
class Drawn:
    """The images of a batch, and what was drawn for them.

    Attributes:
        ids: (B,) of the images.
        neighbour: (2, B) uniform in [0, 1): which of its nearest neighbours each image of a large view gets.
        steps: of the whole training.
    """

    ids: Tensor
    neighbour: Tensor
    steps: int


@in_single_precision
def neighbour_loss(predictions: Tensor, targets: Tensor, neighbours: Tensor, temperature: float) -> Tensor:
    """Return the NNA loss of one large view against another view (section 3, "NNA").

    Args:
        predictions: (B, D) of the other view, not normalised. Those of all processes are candidates.
        targets: (B, D) projections of the large view, not normalised, without gradient.
        neighbours: (B, D) near neighbours of the targets. They stand for the positives.
        temperature: τ.

    Returns:
        The mean loss of this process's images.
    """
    candidates = gather(F.normalize(predictions, dim=1))
    targets, neighbours = F.normalize(targets, dim=1), F.normalize(neighbours, dim=1)
    logits = targets @ candidates.T
    positives = torch.arange(len(targets), device=targets.device) + rank() * len(targets)
    swapped = (neighbours * candidates[positives]).sum(dim=1)
    logits = logits.scatter(1, positives[:, None], swapped[:, None])
    return F.cross_entropy(logits / temperature, positives)


class Queue(nn.Module):
    """The last projections of earlier images, with the ids of these. It is a part of a resume state."""

    projections: Tensor
    ids: Tensor
    end: Tensor

    def __init__(self, places: int, width: int) -> None:
        """Make an empty queue for `places` projections (width,)."""
        super().__init__()
        self.register_buffer("projections", torch.zeros(places, width))
        self.register_buffer("ids", torch.full((places,), EMPTY))
        self.register_buffer("end", torch.tensor(0))

    @torch.no_grad()
    @in_single_precision
    def neighbours(self, targets: Tensor, drawn: Tensor, ids: Tensor, most: int) -> Tensor:
        """Return for each target (B, D) one of its `most` nearest projections of other images, by cosine, (B, D).

        A target that has no neighbour yet, as the queue begins empty, is its own.

        Args:
            targets: not normalised.
            drawn: (B,) in [0, 1): 0 chooses the nearest.
            ids: (B,) of the targets' images. Entries of the same image are no neighbours.
            most: from which one is chosen.
        """
        same = targets.to(self.projections.dtype)
        cosines = F.normalize(same, dim=1) @ F.normalize(self.projections, dim=1).T
        cosines.masked_fill_((self.ids == ids[:, None]) | (self.ids == EMPTY), float("-inf"))
        nearest, places = cosines.topk(min(most, len(self.ids)), dim=1)
        there = nearest.isfinite().sum(dim=1)
        chosen = places.gather(1, (drawn * there).long()[:, None])[:, 0]
        return torch.where((there > 0)[:, None], self.projections[chosen].to(targets.dtype), targets)

    @torch.no_grad()
    def add(self, projections: Tensor, ids: Tensor) -> None:
        """Put in projections (N, D) with their images' ids (N,), in the places of the oldest."""
        projections, ids = projections[-len(self.ids) :], ids[-len(self.ids) :]
        places = (self.end + torch.arange(len(ids), device=ids.device)) % len(self.ids)
        self.projections.index_copy_(0, places, projections.to(self.projections.dtype))
        self.ids.index_copy_(0, places, ids)
        self.end.copy_((self.end + len(ids)) % len(self.ids))


class Head(nn.Module):
    """A projector and a predictor on the features of one block, with a queue."""

    def __init__(self, width: int, hidden: int, dim: int, predictor_hidden: int, places: int) -> None:
        """Build the head for features (B, width)."""
        super().__init__()
        self.projector = mlp(3, width, hidden, dim)
        self.predictor = mlp(2, dim, predictor_hidden, dim)
        self.queue = Queue(places, dim)

    def loss(self, features: list[Tensor], drawn: Drawn, temperature: float, most: int) -> Tensor:
        """Return the mean NNA loss over all pairs of a large view (the first two) and another one. Fill the queue.

        Args:
            features: (B, width) of each view.
            drawn: for these images.
            temperature: τ.
            most: neighbours from which one is chosen.
        """
        z = [self.projector(of_view) for of_view in features]
        predictions = [self.predictor(of_view) for of_view in z]
        targets = [of_view.detach() for of_view in z[:2]]
        near = [self.queue.neighbours(t, d, drawn.ids, most) for t, d in zip(targets, drawn.neighbour, strict=True)]
        loss = mean_over_targets(lambda u, v: neighbour_loss(predictions[v], targets[u], near[u], temperature), len(z))
        if self.training:
            self.queue.add(gather(targets[0]), gather(drawn.ids))
        return loss


class Refine(PretrainingModel):
    """An encoder with a head on each of its last blocks, and its exponential average, which is what is published."""

    def __init__(
        self,
        encoder: VisionTransformer,
        projector_hidden: int,
        projector_dim: int,
        predictor_hidden: int,
        temperature: float,
        params: RefineParams,
        images: int | None = None,
    ) -> None:
        """Put the heads on `encoder`, and copy it. The queues hold at most half as many projections as `images`."""
        super().__init__()
        self.temperature, self.params = temperature, params
        self.encoder = encoder
        places = params.queue if images is None else max(min(params.queue, images // 2), 1)
        shape = (encoder.embed_dim, projector_hidden, projector_dim, predictor_hidden, places)
        self.block_heads = nn.ModuleList(Head(*shape) for _ in range(params.heads))
        self.averaged_encoder = copy.deepcopy(self.encoder).requires_grad_(False)

    @property
    def projector(self) -> nn.Sequential:
        """The projector of the last block."""
        return self._heads()[-1].projector

    def _heads(self) -> list[Head]:
        return [head for head in self.block_heads if isinstance(head, Head)]

    @property
    def published_encoder(self) -> VisionTransformer:
        """The exponential average of the encoder."""
        return self.averaged_encoder

    def momentum_copies(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the average with the encoder that it follows."""
        return [(self.averaged_encoder, self.encoder)]

    def heads(self) -> dict[str, Tensor]:
        """Return the tensors of the heads without the queues."""
        return {name: tensor for name, tensor in super().heads().items() if ".queue." not in name}

    def forward(self, view1: View, view2: View, drawn: Drawn, small: Tensor | None = None) -> Tensor:
        """Update the average, and return the sum of the heads' losses (weight 1 each).

        Args:
            view1: large view of each image.
            view2: another one.
            drawn: for these images.
            small: (n, B, C, s, s), small views of each image.
        """
        if self.training:
            follow(self.averaged_encoder, self.encoder, decay_over(self.params.average, drawn.steps))
        heads = self._heads()
        last_blocks = partial(features_of_last_blocks, self.encoder, blocks=len(heads))
        found = of_views(last_blocks, (view1, view2), small, self.parts)
        losses = [
            head.loss([of_view[place] for of_view in found], drawn, self.temperature, self.params.neighbours)
            for place, head in enumerate(heads)
        ]
        return torch.stack(losses).sum()
