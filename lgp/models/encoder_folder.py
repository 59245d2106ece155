"""Encoder folders. timm alone can load them."""

import errno
import json
from pathlib import Path
from typing import Any, TypeVar

import timm
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.compute.intact import read_json
from lgp.compute.seals import check_sealed
from lgp.data.normalization import Normalization
from lgp.data.storage import Images
from lgp.errors import LgpError, one_line
from lgp.models.files import CONFIG, PROVENANCE, WEIGHTS, how_to_make, no_encoder
from lgp.models.vit import architecture_of, model_args, positions_learn
from lgp.params.data import DataParams
from lgp.params.model import ModelParams

ImagesT = TypeVar("ImagesT", bound=Images)

PIXELS = "pixels"  # the architecture of a folder without an encoder: raw pixels are the features


class Config(BaseModel):
    """What the configuration of an encoder or a classifier has at least."""

    architecture: str
    pretrained_cfg: dict[str, Any]


def save_encoder(
    folder: Path,
    encoder: VisionTransformer,
    model: ModelParams,
    data: DataParams,
    normalization: Normalization,
    provenance: Any,
) -> None:
    """Write an encoder folder: `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` loads it.

    Args:
        folder: to write into; made if missing.
        encoder: the trained encoder; key names are timm's.
        model: its dimensions.
        data: size and channels of its images.
        normalization: of the images that it was trained on.
        provenance: parameters, data digest, code; written beside the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_tensors(tensors, folder / WEIGHTS)
    config = {
        "architecture": architecture_of(model),
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": encoder.global_pool,
        "positions_learn": positions_learn(model),
        "model_args": model_args(model, data),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [data.channels, data.image_size, data.image_size],
            "fixed_input_size": True,
            "mean": normalization.mean,
            "std": normalization.std,
            "interpolation": "bilinear",
            "crop_pct": data.eval_crop,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    save_texts(folder, config, provenance)


def save_pixels(folder: Path, images: Images, provenance: Any) -> None:
    """Write the folder of raw pixels, in place of an encoder folder. It has no weights. timm cannot load it.

    Args:
        folder: to write into; made if missing.
        images: prepared images. Their size, mean and standard deviation are written.
        provenance: parameters, data digest, code.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({}, folder / WEIGHTS)
    size = [images.channels, images.image_size, images.image_size]
    cfg = {"input_size": size, "mean": images.mean, "std": images.std}
    save_texts(folder, {"architecture": PIXELS, "pretrained_cfg": cfg}, provenance)


def save_texts(folder: Path, config: Any, provenance: Any) -> None:
    """Write configuration and provenance beside the weights."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raise `OSError` if the disk is full, in place of the library's own error."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as e:
        if "No space left" in str(e):
            raise OSError(errno.ENOSPC, str(e), str(path)) from None
        raise


def load_encoder(folder: Path) -> VisionTransformer:
    """Load an encoder folder, strictly.

    Raises:
        LgpError: there is no encoder, or its tensors are not those of its configuration. The message names them.
    """
    config = read_config(folder)
    if config["architecture"] == PIXELS:
        raise LgpError(_no_weights(folder))
    encoder: VisionTransformer = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    try:
        encoder.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (RuntimeError, SafetensorError) as e:
        raise LgpError(
            f"{folder / WEIGHTS} is damaged or does not fit its {CONFIG} ({one_line(e)}): "
            f"{how_to_make(folder)} to make both anew"
        ) from None
    encoder.pos_embed.requires_grad_(config.get("positions_learn", False))
    return encoder


def read_config(folder: Path) -> dict[str, Any]:
    """Read an encoder folder's configuration. Raise `LgpError` if there is no encoder, or if it is damaged."""
    _check_present(folder)
    check_sealed(folder, how_to_make(folder))
    config: dict[str, Any] = read_json(folder / CONFIG, Config, how_to_make(folder))
    return config


def _no_weights(folder: Path) -> str:
    return f"{folder} stands for raw pixels, which have no encoder: choose another arm"


def _check_present(folder: Path) -> None:
    if not (folder / WEIGHTS).exists() or not (folder / CONFIG).exists():
        raise LgpError(no_encoder(folder))


def images_for(folder: Path, data: ImagesT) -> ImagesT:
    """Return the prepared images as the encoder in `folder` takes them: normalised as those that it was trained on.

    Whatever feeds prepared images to an encoder folder takes them from here. Only a training that continues the
    encoder keeps the images' own statistics, and `check_start` demands that both are the same.

    Raises:
        LgpError: the encoder takes images of another size or number of channels.
    """
    takes = read_config(folder)["pretrained_cfg"]["input_size"]
    given = [data.channels, data.image_size, data.image_size]
    if takes != given:
        raise LgpError(
            f"the encoder in {folder} takes images of {takes} (channels, height, width), the prepared ones are "
            f"{given}: run `lgp {folder.parent.name}` on them first"
        )
    return data.normalized_by(normalization_of(folder))


def normalization_of(folder: Path) -> Normalization:
    """Return the statistics of the images that the encoder in `folder` was trained on."""
    return Normalization.of(read_config(folder)["pretrained_cfg"])


def check_encoder_fits(folder: Path, model: ModelParams, data: DataParams) -> None:
    """Raise `LgpError` unless the encoder in `folder` has the dimensions of the parameters."""
    config = read_config(folder)
    if config["architecture"] == PIXELS:
        raise LgpError(_no_weights(folder))
    learn = {"positions_learn": config.get("positions_learn", False)}
    found = {"architecture": config["architecture"], **config["model_args"], **learn}
    learn = {"positions_learn": positions_learn(model)}
    wanted = {"architecture": architecture_of(model), **model_args(model, data), **learn}
    if found != wanted:
        raise LgpError(
            f"the encoder in {folder} was trained with {found}, but the parameters say {wanted}: train it anew"
        )


def check_start(folder: Path, model: ModelParams, data: DataParams, images: Images) -> None:
    """Raise `LgpError` unless a training on `images` can continue the encoder in `folder`.

    The encoder must have the dimensions of the parameters, and the images the statistics that it was trained with.
    """
    check_encoder_fits(folder, model, data)
    trained, given = normalization_of(folder), images.normalization
    if trained != given:
        raise LgpError(
            f"the encoder in {folder} was trained on images of {trained}, the prepared ones have {given}: set "
            f"data.mean to {list(trained.mean)} and data.std to {list(trained.std)}, and run `lgp prepare` again"
        )
