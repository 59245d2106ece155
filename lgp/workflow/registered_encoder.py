"""The code that a registered encoder carries. It turns images into features, and does not need `lgp`.

MLflow copies this file into the model ("models from code") and runs it at load time, so it imports nothing
of the project. `registered_classifier.py` opens images in the same way.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor

BATCH = 256
# as in `lgp.data.conversion` and `lgp.data.stored`
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "TGA")
MOST_PIXELS = 2**27
LONGEST_STRIP = 16
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class Encoder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Turns images into features (N, D) float32: the class token after the final norm, if the encoder has one.

    Its input is an array (N, H, W, C) of pixels 0 … 255 of the encoder's size, or (N, H, W) where C is 1. Or it is a
    list of encoded images of any size, as bytes or in base64, or a table that has these in the column `image`.
    """

    def load_context(self, context: Any) -> None:
        """Load the encoder folder among the model's artifacts."""
        folder = Path(context.artifacts["encoder"])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
        self.channels, self.height, self.width = config["input_size"]
        self.mean = torch.tensor(config["mean"]).view(-1, 1, 1)
        self.std = torch.tensor(config["std"]).view(-1, 1, 1)
        self.encoder = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        self.transform = create_transform(**resolve_data_config(self.encoder.pretrained_cfg, model=self.encoder))

    # MLflow warns without a type hint. It does not check this one: arrays and lists are taken too
    def predict(self, context, model_input: pd.DataFrame, params=None):  # type: ignore[no-untyped-def]
        """Return the features of each image."""
        images = _images_of(model_input)
        features = [np.zeros((0, self.encoder.num_features), dtype=np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                rows = range(start, min(start + BATCH, len(images)))
                features.append(self.encoder(torch.stack([self._tensor(row, images[row]) for row in rows])).numpy())
        return np.concatenate(features)

    def _tensor(self, row: int, given: Any) -> Tensor:
        """Turn pixels, or an encoded image, into what the encoder takes, (C, H, W)."""
        if not isinstance(given, np.ndarray):
            return self.transform(self._converted(row, given))
        pixels = given[..., None] if given.ndim == 2 and self.channels == 1 else given
        expected = (self.height, self.width, self.channels)
        if pixels.shape != expected:
            raise ValueError(f"expected images {expected} (height, width, channels), image {row} is {given.shape}")
        scaled = torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1).float() / 255
        return (scaled - self.mean) / self.std

    def _converted(self, row: int, given: str | bytes) -> Image.Image:
        """Turn base64 text or bytes into an upright image. Transparent pixels lie on white."""
        if self.channels not in MODES:
            raise ValueError(f"images of {self.channels} channels are taken as arrays only")
        try:
            data = base64.b64decode(given, validate=True) if isinstance(given, str) else given
            image = _opened(data)
        except Exception as error:  # noqa: BLE001 - decoders of damaged files raise any exception
            raise ValueError(f"image {row} cannot be read: {type(error).__name__}") from None
        if image.mode[0] in "IF":  # Pillow would cut off what is above 255
            raise ValueError(f"image {row} has more than 8 bits a channel: convert it to 8 bits")
        if self.channels in (1, 3) and image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert(MODES[self.channels])


def _opened(data: bytes) -> Image.Image:
    """Open an encoded image, upright, as `lgp` opens those of a data set.

    Of a strip the middle is taken: it would take gigabytes once its shorter side is resized.
    """
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"more than {MOST_PIXELS:,} pixels")
    image = ImageOps.exif_transpose(image)
    width, height = image.size
    cut = max((max(image.size) - LONGEST_STRIP * min(image.size)) // 2, 0)
    return image.crop((cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut))


def _images_of(given: Any) -> list[Any]:
    """Return the images of a request, one by one."""
    if isinstance(given, pd.DataFrame):
        if "image" not in given:
            raise ValueError(f"expected a column `image`, got {', '.join(map(str, given.columns))}")
        return given["image"].tolist()
    if isinstance(given, dict):
        return _images_of(pd.DataFrame(given))
    if isinstance(given, np.ndarray) and given.dtype.kind in "OUS":
        given = given.ravel().tolist()
    if isinstance(given, list) and all(isinstance(image, str | bytes) for image in given):
        return given
    array = np.asarray(given)
    if array.dtype.kind in "iuf" and array.ndim in (3, 4) and _are_pixels(array):
        return list(array)
    raise ValueError(
        "expected encoded images as bytes or in base64, or whole numbers 0 … 255 as (N, H, W) or (N, H, W, C), got "
        f"{array.dtype} {array.shape}"
    )


def _are_pixels(array: np.ndarray) -> bool:
    within = array.min(initial=0) >= 0 and array.max(initial=0) <= 255
    return bool(within and (array.dtype.kind != "f" or (array == np.round(array)).all()))


mlflow.models.set_model(Encoder())
