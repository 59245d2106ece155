"""Offers of made images, which tests store."""

import functools
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lgp.data.sources.offers import Offers, Read
from lgp.data.writing import Stored, store
from lgp.params.data import DataParams

RNG = np.random.default_rng(0)
GIVEN = {"source": "x", "test_share": 0.1, "val_share": 0.1, "max_unreadable_share": 0.5}


def data_params(channels: int = 3, **changes: Any) -> DataParams:
    params = DataParams.model_validate(GIVEN | {"image_size": 8, "channels": 3} | changes)
    return params.model_copy(update={"channels": channels})


def same(data: bytes | np.ndarray) -> bytes | np.ndarray:
    return data


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def offers_of(reads: Sequence[Read]) -> Offers:
    count = len(reads)
    named = [f"{i}.png" for i in range(count)]
    states = [str(i) for i in range(count)]
    return Offers(
        named, ["train"] * count, [None] * count, [None] * count, states, [], lambda at: (reads[i] for i in at)
    )


def offers_from(images: Sequence[bytes | np.ndarray]) -> Offers:
    return offers_of([functools.partial(same, data) for data in images])


def stored(tmp_path: Path, offers: Offers, params: DataParams, workers: int = 1) -> tuple[Stored, Path]:
    work, out = tmp_path / "work", tmp_path / "out"
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    return store(offers, range(len(offers)), params, work, out, workers), out


def slow(number: int) -> np.ndarray:
    time.sleep(0.005)
    return np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def bitmap(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((200, 200, 3), number % 256, dtype=np.uint8)).save(buffer, "bmp")
    return buffer.getvalue()


def stuck(number: int) -> np.ndarray:
    """Read the images of `slow` up to number 149, and never come to an end at a later one."""
    if number >= 150:
        time.sleep(600)
    return slow(number)
