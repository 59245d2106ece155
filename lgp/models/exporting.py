"""Export of a model folder to files that need no `lgp`: ONNX, torch's exported program, MAE's layout.

A model folder is what plain timm loads: an encoder folder, or a classifier folder, which also has a head and the names
of its classes. All that is said of an encoder here holds for a classifier. Its logits are already divided by its
temperature, so their softmax has the probabilities.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.errors import LgpError, one_line
from lgp.models.classifier_folder import HEAD
from lgp.models.encoder_folder import PIXELS, normalization_of, read_config
from lgp.models.files import CONFIG, WEIGHTS
from lgp.models.heads_file import load_heads
from lgp.models.interchange import export_checkpoint

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
ABOUT_FILE = "about.json"  # the file in a `.pt2` that holds what `about` returns
TRACED, CHECKED = 2, 3  # images of the two batches: a batch of one would be taken for a fixed size
ONNX_TOLERANCE, PROGRAM_TOLERANCE = 1e-4, 1e-5  # times the largest output, where that is above 1


@contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """Give the place where a new file or folder `path` is written first. It is moved to `path` at the end of the block.

    A block that fails leaves nothing. What is written beside the file, as ONNX does above 2 GB, is moved with it.

    Raises:
        LgpError: `path` exists.
    """
    if path.exists():
        raise LgpError(f"{path} exists already: move it away, or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial.", dir=path.parent) as folder:
        yield Path(folder) / path.name
        for written in Path(folder).iterdir():
            written.rename(path.with_name(written.name))


def load_model(folder: Path) -> VisionTransformer:
    """Load a model folder with its head, if it has one, as timm alone loads it. It is in evaluation mode.

    Raises:
        LgpError: there is no model, it stands for raw pixels, its head is none that timm knows, or its tensors are not
            those of its configuration.
    """
    if read_config(folder)["architecture"] == PIXELS:
        raise LgpError(f"{folder} stands for raw pixels, which have no weights to export: choose another arm")
    if (folder / HEAD).exists():
        raise LgpError(
            f"the head of {folder} has no place in timm (features.blocks above 1, or fewshot.scaling normalized): "
            "choose another classifier, or export its encoder"
        )
    try:
        model: VisionTransformer = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except (RuntimeError, SafetensorError) as e:
        raise LgpError(f"{folder / WEIGHTS} is damaged or does not fit its {CONFIG}: {one_line(e)}") from None
    return model.eval()


def about(config: dict[str, Any]) -> dict[str, Any]:
    """Return what a user of the model must know beside its weights, from its configuration.

    These are `input_size` (channels, height, width), `mean`, `std`, `interpolation` and `crop_pct` of its images, and
    of a classifier the `label_names`.
    """
    cfg = config["pretrained_cfg"]
    of_images = {key: cfg[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    return of_images | ({"label_names": config["label_names"]} if "label_names" in config else {})


def output_name(config: dict[str, Any]) -> str:
    """Return what the model gives: `logits` (N, classes) of a classifier, `features` (N, width) of an encoder."""
    return "logits" if config["num_classes"] else "features"


def export_onnx(folder: Path, path: Path) -> str:
    """Write a model as ONNX, and return a sentence on it.

    The input `images` is (N, C, S, S) float32, normalised, of any N. The file's metadata holds `about`, in JSON.

    Args:
        folder: of the model.
        path: to write.

    Raises:
        LgpError: the extra `export` is not installed, there is no model, or onnxruntime does not give torch's outputs.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LgpError(f"ONNX needs {', '.join(missing)}: pip install 'lgp[export]'")
    import onnxruntime

    model, config = load_model(folder), read_config(folder)
    program = torch.onnx.export(
        model,
        (_images(config, TRACED),),
        input_names=["images"],
        output_names=[output_name(config)],
        dynamic_shapes=({0: "batch"},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about(config).items()})
    program.save(path)
    images = _images(config, CHECKED)
    (outputs,) = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    difference = _difference(model, images, outputs, ONNX_TOLERANCE, "onnxruntime")
    return f"{_signature(config)}; onnxruntime differs from torch by at most {difference:.0e}"


def export_program(folder: Path, path: Path) -> str:
    """Write a model as torch's exported program, which `torch.export.load` reads, and return a sentence on it.

    Its input is (N, C, S, S) float32, normalised, of any N. Its extra file `ABOUT_FILE` holds `about`.

    Args:
        folder: of the model.
        path: to write, with the suffix `.pt2`.

    Raises:
        LgpError: there is no model, or the file does not give its outputs.
    """
    model, config = load_model(folder), read_config(folder)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (_images(config, TRACED),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={ABOUT_FILE: json.dumps(about(config))})
    images = _images(config, CHECKED)
    outputs = torch.export.load(path).module()(images).detach().numpy()
    difference = _difference(model, images, outputs, PROGRAM_TOLERANCE, "the exported program")
    return f"{_signature(config)}; it differs from the model by at most {difference:.0e}"


def export_mae(folder: Path, path: Path) -> str:
    """Write a model, and the MAE decoder beside it if there is one, in MAE's layout. Return a sentence on it.

    Args:
        folder: of the model.
        path: to write.

    Raises:
        LgpError: there is no model.
    """
    normalization = normalization_of(folder)
    count = export_checkpoint(load_model(folder).state_dict(), load_heads(folder.parent), normalization, path)
    return f"{count} tensors under `model`, as MAE names them; normalise images by {normalization}"


def _images(config: dict[str, Any], n: int) -> Tensor:
    """Return n images of noise, as a model takes them."""
    return torch.randn(n, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0))


def _difference(model: VisionTransformer, images: Tensor, outputs: np.ndarray, tolerance: float, what: str) -> float:
    """Return the largest difference of outputs from those of the model. Raise `LgpError` if it is too large."""
    with torch.inference_mode():
        expected = model(images).numpy()
    difference = float(np.abs(outputs - expected).max())
    if not difference <= tolerance * max(1.0, float(np.abs(expected).max())):
        raise LgpError(
            f"{what} differs from the model by {difference:.0e}, more than {tolerance:.0e}: nothing is written; try "
            "another version of torch or onnxruntime, or another format"
        )
    return difference


def _signature(config: dict[str, Any]) -> str:
    size = ", ".join(map(str, config["pretrained_cfg"]["input_size"]))
    return (
        f"normalised images (N, {size}) to {output_name(config)} (N, {config['num_classes'] or config['num_features']})"
    )
