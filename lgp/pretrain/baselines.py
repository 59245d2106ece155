"""The untrained baselines: raw pixels, and the same network with random weights. Any encoder must beat both."""

from timm.models.vision_transformer import VisionTransformer

from lgp.compute.randomness import seeded
from lgp.models.vit import build_encoder, init_encoder_as_moco
from lgp.params.file import Params


def baseline_encoder(name: str, params: Params) -> VisionTransformer | None:
    """Return the encoder of the baseline `random`; None for `pixels`, which has none."""
    if name == "pixels":
        return None
    with seeded(params.seed, "random/init"):
        encoder = build_encoder(params.model, params.data)
        init_encoder_as_moco(encoder)
    return encoder
