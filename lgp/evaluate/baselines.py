"""What any encoder must beat: raw pixels, and the same network with random weights."""

import json
from collections.abc import Callable
from hashlib import sha256

import torch
from timm.models.vision_transformer import VisionTransformer

from lgp.data.prepared import Prepared
from lgp.evaluate.cache import FeatureCache, FeatureSource, pixel_source
from lgp.evaluate.features import by_block_of
from lgp.evaluate.fewshot import evaluate_fewshot
from lgp.evaluate.linear import evaluate_linear
from lgp.evaluate.outcome import Outcome
from lgp.models.vit import build_encoder, init_encoder_as_moco, model_args
from lgp.params import Params
from lgp.randomness import seeded


def _random_encoder(params: Params) -> VisionTransformer:
    with seeded(params.seed, "random/init"):
        encoder = build_encoder(params.model, params.data)
        init_encoder_as_moco(encoder)
    return encoder


def _random_source(params: Params, device: torch.device) -> FeatureSource:
    settings, depth = params.features, params.model.depth
    blocks = depth if settings.by_depth else settings.blocks
    decided_by = ["random", params.seed, model_args(params.model, params.data), settings.pool, blocks, device.type]
    digest = sha256(json.dumps(decided_by).encode()).hexdigest()
    return FeatureSource(digest, blocks, lambda: by_block_of(_random_encoder(params), settings.pool, blocks, device))


BASELINES: dict[str, Callable[[Params, torch.device], FeatureSource]] = {
    "pixels": lambda _params, _device: pixel_source(),
    "random": _random_source,
}


def evaluate_baseline(
    name: str, data: Prepared, params: Params, cache: FeatureCache, device: torch.device
) -> dict[str, Outcome]:
    """Run the protocol on frozen features of the baseline `name`, `pixels` or `random`: task → outcome."""
    features = cache.features(BASELINES[name](params, device), data)
    tasks = {"linear": evaluate_linear(features, params.linear, params.seed, device, params.run)}
    return tasks | {
        f"fewshot-{labels}": evaluate_fewshot(features, data.subsets(labels), params.fewshot)
        for labels in params.few_labels
    }
