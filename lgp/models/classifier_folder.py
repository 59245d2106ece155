"""Classifier folders: an encoder with a head for classes. timm alone can load those whose head is plain.

| file | content |
|---|---|
| `model.safetensors` | the weights, timm's names; a plain head is among them |
| `config.json` | as an encoder folder's, with `num_classes`, `label_names`, `temperature` and `lgp` |
| `head.safetensors` | a head that timm has no place for: `weight` and `bias` |
| `provenance.json` | arm, task, metrics, digests |
| `digests.json` | digests of these files, which are compared when the folder is opened |

Logits are already divided by the temperature, so their softmax has the calibrated probabilities. A head is plain if it
sits on the class token or on the average patch of the last block. It is not plain on several blocks, on features that
are normalised per image, and on raw pixels.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lgp.errors import LgpError, one_line
from lgp.models.encoder_folder import PIXELS, load_encoder, read_config, save_tensors, save_texts
from lgp.models.files import CONFIG, WEIGHTS, how_to_make
from lgp.models.vit import pooled_by_block

HEAD = "head.safetensors"
Pool = Literal["class_token", "average"]


@dataclass(frozen=True)
class Head:
    """A linear classifier on frozen features: logits = weight · features + bias.

    Attributes:
        weight: (K, D) float64.
        bias: (K,) float64.
        pool: how the features of a block are made of its tokens.
        blocks: number of last blocks whose features are concatenated.
        normalized: whether the features of each image first get mean 0 and length 1.
    """

    weight: np.ndarray
    bias: np.ndarray
    pool: Pool = "class_token"
    blocks: int = 1
    normalized: bool = False

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Return the logits (N, K) of features (N, D), float64."""
        return features @ self.weight.T + self.bias

    def on_unscaled(self, mean: np.ndarray, std: np.ndarray) -> "Head":
        """Return the same classifier for features that are not standardised: its own are (features - mean) / std."""
        weight = self.weight / std
        return replace(self, weight=weight, bias=self.bias - weight @ mean)

    def divided_by(self, temperature: float) -> "Head":
        """Return the head with its logits divided by a temperature."""
        return replace(self, weight=self.weight / temperature, bias=self.bias / temperature)

    @property
    def plain(self) -> bool:
        """Whether timm has a place for it."""
        return self.blocks == 1 and not self.normalized


@dataclass(frozen=True)
class Classifier:
    """What an evaluation keeps: a head on a frozen encoder, or a whole fine-tuned model.

    Attributes:
        temperature: by which the logits are divided already.
        head: on the encoder that was evaluated.
        model: the weights of timm's classifier, if it was fine-tuned.
        model_args: arguments of timm that differ from the encoder's.
        interpolation: of the images' resizing.
    """

    temperature: float
    head: Head | None = None
    model: Mapping[str, Tensor] | None = None
    model_args: Mapping[str, Any] | None = None
    interpolation: str = "bilinear"


def save_classifier(
    folder: Path, encoder: Path, classifier: Classifier, classes: Sequence[str], provenance: Mapping[str, Any]
) -> None:
    """Write a classifier folder: `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it with its head.

    Args:
        folder: to write into; made if missing.
        encoder: folder of the encoder that was evaluated.
        classifier: what the evaluation keeps.
        classes: names of the K classes.
        provenance: arm, task, metrics and digests; written beside the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, head = read_config(encoder), classifier.head
    own: dict[str, Any] = {}
    if head is not None:
        own |= {"pool": head.pool, "blocks": head.blocks, "normalized": head.normalized}
        tensors = _tensors_of_head(folder, encoder, head, config["architecture"] != PIXELS)
    else:
        assert classifier.model is not None
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.model.items()}
    save_tensors(tensors, folder / WEIGHTS)
    plain = "head.weight" in tensors
    changes: dict[str, Any] = {"num_classes": len(classes)} if plain else {}
    if head is not None and plain and head.pool == "average" and config["global_pool"] == "token":
        changes["model_args"] = {**config["model_args"], "global_pool": "avg", "fc_norm": False}
    if classifier.model_args:
        changes["model_args"] = {**config["model_args"], **classifier.model_args}
    cfg = config["pretrained_cfg"] | ({"num_classes": len(classes)} if plain else {})
    changes["pretrained_cfg"] = cfg | {"interpolation": classifier.interpolation}
    save_texts(
        folder,
        config | changes | {"label_names": list(classes), "temperature": classifier.temperature, "lgp": own},
        dict(provenance),
    )


def _tensors_of_head(folder: Path, encoder: Path, head: Head, has_encoder: bool) -> dict[str, Tensor]:
    """Return the encoder's weights, with a plain head among them. Write another head into a file of its own."""
    of_head = {"weight": torch.from_numpy(head.weight).float(), "bias": torch.from_numpy(head.bias).float()}
    tensors = load_file(encoder / WEIGHTS)
    if has_encoder and head.plain:
        return tensors | {f"head.{name}": tensor.contiguous() for name, tensor in of_head.items()}
    save_tensors({name: tensor.contiguous() for name, tensor in of_head.items()}, folder / HEAD)
    return tensors


@dataclass(frozen=True)
class OpenedClassifier:
    """A classifier folder, opened.

    Attributes:
        logits: normalised images (B, C, S, S) → (B, K), on the device.
        classes: names of the K classes.
        config: of the folder.
    """

    logits: Callable[[Tensor], Tensor]
    classes: list[str]
    config: dict[str, Any]


def load_classifier(folder: Path, device: torch.device) -> OpenedClassifier:
    """Open a classifier folder, strictly.

    Raises:
        LgpError: there is none, or it is damaged. The message says what to do.
    """
    if not all((folder / name).exists() for name in (WEIGHTS, CONFIG)):
        raise LgpError(f"there is no classifier in {folder}: `lgp fewshot`, `lgp linear` or `lgp finetune` writes one")
    config = read_config(folder)
    if "label_names" not in config:
        raise LgpError(f"{folder} has an encoder without classes: give a folder in models/ARM/classifiers")
    try:
        logits = _logits_of(folder, config, device)
    except (RuntimeError, SafetensorError, KeyError) as e:
        raise LgpError(f"{folder} is damaged: {one_line(e)}; {how_to_make(folder)} again") from None
    return OpenedClassifier(logits, list(config["label_names"]), config)


def _logits_of(folder: Path, config: dict[str, Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    if not (folder / HEAD).exists():
        model: nn.Module = timm.create_model(
            config["architecture"], num_classes=config["num_classes"], **config["model_args"]
        )
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
        return model.to(device).eval()
    own, tensors = config["lgp"], load_file(folder / HEAD)
    weight, bias = tensors["weight"].to(device), tensors["bias"].to(device)
    encode = _features_of(folder, config, device)

    def logits(images: Tensor) -> Tensor:
        features = encode(images.to(device))
        if own["normalized"]:
            features = features - features.mean(dim=1, keepdim=True)
            features = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return features @ weight.T + bias

    return logits


def _features_of(folder: Path, config: dict[str, Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    if config["architecture"] == PIXELS:
        return lambda images: images.flatten(1)
    own, encoder = config["lgp"], load_encoder(folder).to(device).eval()
    return lambda images: pooled_by_block(encoder, images, own["pool"], own["blocks"]).flatten(1)


def write_classifier(file: Path, classifier: Classifier, digest: str) -> None:
    """Write a classifier into one safetensors file, with a digest of what decided it."""
    head, record = classifier.head, asdict(replace(classifier, head=None, model=None))
    if head is not None:
        tensors = {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)}
        record["head"] = {"pool": head.pool, "blocks": head.blocks, "normalized": head.normalized}
    else:
        assert classifier.model is not None
        tensors = dict(classifier.model)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_tensors(contiguous, file, {"lgp": json.dumps([digest, record])})


def read_classifier(file: Path, digest: str) -> Classifier | None:
    """Read what `write_classifier` wrote. None: there is no such file, or other things decided it."""
    try:
        with safe_open(file, framework="pt") as opened:
            found, record = json.loads(opened.metadata()["lgp"])
        tensors = load_file(file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    if found != digest:
        return None
    of_head = record.pop("head")
    if of_head is None:
        return Classifier(**record | {"model": tensors})
    head = Head(tensors["weight"].numpy(), tensors["bias"].numpy(), **of_head)
    return Classifier(**record | {"head": head})
