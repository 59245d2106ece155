"""The images of any source as an encoder takes them, and their features, batch by batch in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lgp.data.normalization import Normalization
from lgp.data.sources.offers import Offers, Skipped
from lgp.data.squares import Form, squares
from lgp.features.of_encoder import live_features_of
from lgp.models.encoder_folder import read_config
from lgp.params.evaluate import FeatureParams


@dataclass(frozen=True)
class SourceBatch:
    """Some images of a source.

    Attributes:
        paths: of all of them.
        reasons: why an image cannot be read, empty where it can.
        rows: places of those that can.
        images: (rows, C, S, S), normalised, on the device.
    """

    paths: list[str]
    reasons: list[str]
    rows: list[int]
    images: Tensor


def form_of(config: dict[str, Any]) -> Form:
    """Return the squares that the encoder of a folder takes, from its configuration."""
    cfg = config["pretrained_cfg"]
    channels, size, _ = cfg["input_size"]
    return Form(channels, size, int(size / cfg.get("crop_pct", 1.0)), cfg.get("interpolation", "bilinear"))


def source_batches(
    offers: Offers, config: dict[str, Any], device: torch.device, workers: int | None = None
) -> Iterator[SourceBatch]:
    """Yield the images of a source, in order.

    Args:
        offers: the source.
        config: of the encoder folder that takes the images.
        device: where they go.
        workers: processes that decode. None: one per core.
    """
    statistics, form = Normalization.of(config["pretrained_cfg"]), form_of(config)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (statistics.mean, statistics.std))
    done = 0
    for chunk in squares(offers, form, workers):
        paths = offers.paths[done : done + len(chunk)]
        done += len(chunk)
        rows = [i for i, image in enumerate(chunk) if not isinstance(image, str)]
        read = [image for image in chunk if not isinstance(image, str)]
        pixels = np.stack(read) if read else np.zeros((0, form.size, form.size, form.channels), dtype=np.uint8)
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
        yield SourceBatch(
            paths, [image if isinstance(image, str) else "" for image in chunk], rows, (images - mean) / std
        )


def left_out(offers: Offers) -> list[Skipped]:
    """Return the files that are no image of the source, with the reasons."""
    return [*offers.skipped, *offers.clutter]


@torch.inference_mode()
def embeddings(
    encoder: Path,
    offers: Offers,
    params: FeatureParams,
    device: torch.device,
    dtype: str = "float32",
    workers: int | None = None,
) -> Iterator[pd.DataFrame]:
    """Yield path and features of each image of a source that can be read, chunk by chunk.

    Args:
        encoder: folder of the encoder.
        offers: the source.
        params: pooling, as evaluations use it.
        device: where to compute.
        dtype: float16 or float32.
        workers: processes that decode. None: one per core.
    """
    encode = live_features_of(encoder, params, device)
    for batch in source_batches(offers, read_config(encoder), device, workers):
        if batch.rows:
            features = encode(batch.images).float().cpu().numpy().astype(dtype)
            yield pd.DataFrame({"path": [batch.paths[i] for i in batch.rows], "features": list(features)})
