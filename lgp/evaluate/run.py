"""An evaluation as a stage: an arm's features from the cache in, metrics, predictions and pictures out."""

import json
import os
from hashlib import sha256
from pathlib import Path

import torch

from lgp.checkpoint import check_input_size, load_encoder, read_config
from lgp.data.prepared import Prepared
from lgp.evaluate.cache import FeatureCache, Features, FeatureSource
from lgp.evaluate.features import Encode, by_block_of
from lgp.evaluate.outcome import Outcome
from lgp.params import FeatureParams, Params
from lgp.stage import StageRun, encoder_digest

CACHE = Path(".lgp") / "features"


def feature_cache(params: Params) -> FeatureCache:
    """Open the cache of this project."""
    return FeatureCache(Path(os.environ.get("DVC_ROOT", ".")) / CACHE, params.features, params.run.feature_cache_gib)


def encoder_source(folder: Path, params: FeatureParams, device: torch.device) -> FeatureSource:
    """Describe the features of the encoder in `folder`."""
    depth = int(read_config(folder)["model_args"]["depth"])
    blocks = depth if params.by_depth else params.blocks
    decided_by = [encoder_digest(folder), read_config(folder)["model_args"], params.pool, blocks, device.type]
    digest = sha256(json.dumps(decided_by).encode()).hexdigest()
    return FeatureSource(digest, blocks, lambda: by_block_of(load_encoder(folder), params.pool, blocks, device))


def encoder_features(folder: Path, data: Prepared, params: Params, device: torch.device) -> Features:
    """Return the features of the encoder in `folder` for train, val and test."""
    check_input_size(folder, data)
    return feature_cache(params).features(encoder_source(folder, params.features, device), data)


def live_features_of(folder: Path, params: FeatureParams, device: torch.device) -> Encode:
    """Return the function that computes what `Features.x` holds, (B, D), of any images."""
    encode = by_block_of(load_encoder(folder), params.pool, params.blocks, device)
    return lambda images: encode(images).flatten(1)


def publish_outcome(
    run: StageRun, encoder: Path, metrics: Path, predictions: Path, outcome: Outcome, data: Prepared
) -> None:
    """Write the metric file and the predictions, and track both, with the confusion matrix as a picture.

    The metrics name the encoder by its digest, so that they differ wherever it does.
    """
    outcome.predictions.to_parquet(run.out(predictions), index=False)
    run.write_metrics(run.out(metrics), {**outcome.metrics, "encoder": encoder_digest(encoder)})
    print(f"{run.spec.arm} / {run.spec.task}: {outcome.metrics['test/top1']:.1f} % top-1 on test", flush=True)
    run.tracker.log_confusion(outcome.predictions, data.classes)
