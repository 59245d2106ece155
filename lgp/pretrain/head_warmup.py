"""Head warm-up: new heads learn on the frozen encoder before the encoder learns (MAE-CT and MIM-Refiner, stage 2).

New heads give the encoder gradients of no meaning at first. `graft.head_warmup_epochs` lets them learn apart.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lgp.data.loading import Batch, CropDataset
from lgp.features.extraction import Encode, features_of
from lgp.features.online_knn import OnlineKnn
from lgp.models.roles import PretrainingModel
from lgp.training.loop import Epoch, Observer

METRIC = "heads"


@dataclass(frozen=True)
class HeadWarmup:
    """The training of the heads before the encoder learns.

    Attributes:
        epochs: passes over the images, 1 or more.
        loss_of: batch → scalar loss. It draws its own views and masks.
        crops: gives the batch of each step.
    """

    epochs: int
    loss_of: Callable[[Batch], Tensor]
    crops: CropDataset


@contextmanager
def frozen_encoder(model: PretrainingModel) -> Iterator[None]:
    """Let only the heads learn in the block. Whatever learnt before learns again after it."""
    learning = [p for p in model.encoder.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@dataclass
class HeadsObserver:
    """Logs the epochs of the head warm-up as `heads/loss` and so on, apart from those of the training after it."""

    observer: Observer

    def log_epoch(self, values: Epoch) -> None:
        """Log an epoch."""
        named = {f"{METRIC}/{name.partition('/')[2]}": value for name, value in values.items() if "/" in name}
        self.observer.log_epoch({"epoch": values["epoch"], **named})


def knn_in_head(model: PretrainingModel, knn: OnlineKnn, device: torch.device) -> dict[str, float]:
    """Return k-NN accuracy on val, in percent, of the encoder's features and after each layer of the projector.

    MIM-Refiner (Alkin et al. 2024, section 3) sees what a head makes of the encoder's features by it. The model is in
    evaluation mode afterwards.

    Returns:
        `heads/knn_encoder`, `heads/knn_layer1`, …; only the first for a model without a projector.
    """
    model.eval()
    features, layers = features_of(model.encoder, device), list(getattr(model, "projector", ()))
    # a layer of the head ends where the next linear one begins
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    parts = {"knn_encoder": nn.Sequential()}
    parts |= {f"knn_layer{i}": nn.Sequential(*layers[:end]) for i, end in enumerate([*starts[1:], len(layers)], 1)}

    def through(part: nn.Sequential) -> Encode:
        return lambda images: part(features(images))

    return {f"{METRIC}/{name}": knn.top1(through(part)) for name, part in parts.items()}
