"""Both objectives on one encoder, for the control that sums their losses (LGP, section 3.1)."""

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lgp.models.contrastive import Contrastive
from lgp.models.mae import MAE
from lgp.models.roles import PretrainingModel


class Joint(PretrainingModel):
    """A contrastive model and a masked autoencoder that share their encoder."""

    def __init__(self, contrastive: Contrastive, mae: MAE) -> None:
        """Take both models unchanged. Their encoder must be the same module."""
        super().__init__()
        self.contrastive, self.mae = contrastive, mae

    @property
    def encoder(self) -> VisionTransformer:
        """The shared encoder."""
        return self.contrastive.encoder

    @property
    def published_encoder(self) -> VisionTransformer:
        """What the contrastive model publishes."""
        return self.contrastive.published_encoder

    @property
    def projector(self) -> nn.Sequential:
        """The projector of the contrastive model."""
        return self.contrastive.projector

    def momentum_copies(self) -> list[tuple[nn.Module, nn.Module]]:
        """Return the momentum copies of the contrastive model."""
        return self.contrastive.momentum_copies()
