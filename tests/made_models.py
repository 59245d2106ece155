"""Small model folders with random weights: encoders, and classifiers of five classes as evaluations leave them."""

from pathlib import Path

import timm
import torch
import yaml
from conftest import ROOT
from torch import Tensor, nn

from lgp.data.normalization import Normalization
from lgp.models.classifier_folder import Classifier, save_classifier
from lgp.models.encoder_folder import read_config, save_encoder
from lgp.models.vit import ARCHITECTURE, build_encoder
from lgp.params.data import DataParams
from lgp.params.model import ModelParams

CLASSES = ["ant", "bee", "cat", "dog", "élan"]
TEMPERATURE = 1.75


def make_encoder(folder: Path, channels: int) -> Path:
    """Write an encoder of 8×8 images, none of whose weights is at a special value."""
    preset = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text())
    data = DataParams.model_validate(preset["data"] | {"channels": channels})
    model = ModelParams(patch_size=2, width=16, depth=1, heads=2)
    torch.manual_seed(channels)
    encoder = build_encoder(model, data)
    _randomise(encoder)
    normalization = Normalization((0.3, 0.4, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels])
    save_encoder(folder, encoder, model, data, normalization, {"metrics": {}})
    return folder


def make_classifier(folder: Path, encoder: Path) -> Path:
    """Write a classifier of random weights as an evaluation does."""
    torch.manual_seed(9)
    model = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), **read_config(encoder)["model_args"])
    _randomise(model)
    save_classifier(folder, encoder, Classifier(TEMPERATURE, model=model.state_dict()), CLASSES, {"metrics": {}})
    return folder


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def by_timm(folder: Path, images: Tensor) -> Tensor:
    """Return what plain timm gives for normalised images."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        outputs: Tensor = model(images)
    return outputs
