"""The code that a registered classifier carries. It turns images into classes, and does not need `lgp`.

MLflow copies this file into the model ("models from code") and runs it at load time, so it imports nothing
of the project.
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

BATCH = 64
# as in `lgp.data.conversion` and `lgp.data.stored`
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "TGA")
MOST_PIXELS = 2**27
LONGEST_STRIP = 16
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Turns encoded images or pixels into classes with probabilities.

    Its input is a table with a column `image` of encoded images, as bytes or in base64, a list of these, or an array
    (N, H, W, C) or (N, H, W) of pixels 0 … 255 of any size. Its output is a table: class, probability, and the
    probability of every class.
    """

    def load_context(self, context: Any) -> None:
        """Load the classifier folder among the model's artifacts."""
        folder = Path(context.artifacts["classifier"])
        self.classes = json.loads((folder / "config.json").read_text(encoding="utf-8"))["label_names"]
        self.model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        config = resolve_data_config(self.model.pretrained_cfg, model=self.model)
        channels = config["input_size"][0]
        if channels not in MODES:
            raise ValueError(f"images of {channels} channels cannot be served, only of 1 to 4: use `lgp predict`")
        self.mode = MODES[channels]
        self.transform = create_transform(**config)

    # MLflow warns without a type hint. It does not check this one: arrays and lists are taken too
    def predict(self, context, model_input: pd.DataFrame, params=None):  # type: ignore[no-untyped-def]
        """Return class, probability and the probabilities of all classes of each image."""
        images = [self._image(row, given) for row, given in enumerate(_images_of(model_input))]
        probabilities = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = torch.stack([self.transform(image) for image in images[start : start + BATCH]])
                probabilities.append(self.model(batch).softmax(1).numpy())
        of_all = np.concatenate(probabilities) if probabilities else np.zeros((0, len(self.classes)))
        best = of_all.argmax(1)
        return pd.DataFrame(
            {
                "class": [self.classes[i] for i in best],
                "probability": of_all.max(1) if len(of_all) else [],
                "probabilities": [dict(zip(self.classes, map(float, row), strict=True)) for row in of_all],
            }
        )

    def _image(self, row: int, given: Any) -> Image.Image:
        """Turn base64 text, bytes or pixels into an upright image. Transparent pixels lie on white."""
        try:
            if isinstance(given, np.ndarray):
                pixels = given[..., 0] if given.ndim == 3 and given.shape[2] == 1 else given
                image = Image.fromarray(pixels.astype(np.uint8))
            else:
                data = base64.b64decode(given, validate=True) if isinstance(given, str) else given
                image = _opened(data)
        except Exception as error:  # noqa: BLE001 - decoders of damaged files raise any exception
            raise ValueError(f"image {row} cannot be read: {type(error).__name__}") from None
        if image.mode[0] in "IF":  # Pillow would cut off what is above 255
            raise ValueError(f"image {row} has more than 8 bits a channel: convert it to 8 bits")
        if self.mode in ("L", "RGB") and image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert(self.mode)


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


mlflow.models.set_model(ImageClassifier())
