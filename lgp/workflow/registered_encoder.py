"""The code that a registered encoder carries. It turns images into features, and does not need `lgp`.

MLflow copies this file into the model ("models from code") and runs it at load time, so it imports nothing
of the project.
"""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import timm
import torch

BATCH = 256


class Encoder(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Turns images (N, H, W, C) uint8 into features (N, D) float32. Where C is 1, images may be (N, H, W)."""

    def load_context(self, context: Any) -> None:
        """Load the encoder folder among the model's artifacts."""
        folder = Path(context.artifacts["encoder"])
        config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        self.channels, self.height, self.width = config["input_size"]
        self.mean = torch.tensor(config["mean"]).view(-1, 1, 1)
        self.std = torch.tensor(config["std"]).view(-1, 1, 1)
        self.encoder = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return the class token of each image after the final norm."""
        images = np.asarray(model_input)
        if images.ndim == 3 and self.channels == 1:
            images = images[..., None]
        expected = (self.height, self.width, self.channels)
        if images.shape[1:] != expected or images.dtype != np.uint8:
            raise ValueError(
                f"expected uint8 images (N, {', '.join(map(str, expected))}), got {images.dtype} {images.shape}"
            )
        features = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
                features.append(self.encoder((batch - self.mean) / self.std).numpy())
        return np.concatenate(features)


mlflow.models.set_model(Encoder())
