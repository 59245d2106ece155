"""The cached features of an arm, by its encoder folder."""

import json
import os
from hashlib import sha256
from pathlib import Path

import torch

from lgp.data.labels import LabelledImages
from lgp.features.cache import FeatureCache, Features, FeatureSource, pixel_source
from lgp.features.extraction import Encode, Running, by_block_of, pixels
from lgp.models.encoder_folder import PIXELS, images_for, load_encoder, read_config
from lgp.models.files import encoder_digest
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params

CACHE = Path(".lgp") / "features"


def feature_cache(params: Params) -> FeatureCache:
    """Open the cache of this project."""
    return FeatureCache(Path(os.environ.get("DVC_ROOT", ".")) / CACHE, params.features, params.run.feature_cache_gib)


def encoder_source(folder: Path, params: FeatureParams, running: Running) -> FeatureSource:
    """Return the feature source of the encoder in `folder`. Its device and its precision decide the last digits."""
    config = read_config(folder)
    if config["architecture"] == PIXELS:
        return pixel_source(running.workers)
    blocks = int(config["model_args"]["depth"]) if params.by_depth else params.blocks
    network = {key: config[key] for key in ("architecture", "model_args")}
    device = running.device
    computed = device.type if running.precision == torch.float32 else f"{device.type} {running.precision}"
    decided_by = [encoder_digest(folder), network, params.pool, blocks, computed]
    digest = sha256(json.dumps(decided_by).encode()).hexdigest()
    return FeatureSource(
        digest, blocks, lambda: by_block_of(load_encoder(folder), params.pool, blocks, device), running
    )


def encoder_features(folder: Path, data: LabelledImages, params: Params, device: torch.device) -> Features:
    """Return the features of the encoder in `folder` for train, val and test."""
    source = encoder_source(folder, params.features, Running.of(params.run, device))
    return feature_cache(params).features(source, images_for(folder, data))


def live_features_of(folder: Path, params: FeatureParams, device: torch.device) -> Encode:
    """Return the function that computes the features of `Features.x`, (B, D), for any images."""
    if read_config(folder)["architecture"] == PIXELS:
        return pixels
    encode = by_block_of(load_encoder(folder), params.pool, params.blocks, device)
    return lambda images: encode(images).flatten(1)
