"""A small parameter set and prepared digits that the tests share."""

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from lgp.data.labels import LabelledImages, write_labels
from lgp.data.normalization import Normalization
from lgp.data.preparation import prepare
from lgp.data.storage import Images
from lgp.models.encoder_folder import save_encoder, save_tensors
from lgp.models.files import CONFIG, HEADS
from lgp.models.vit import build_encoder
from lgp.params.data import DataParams
from lgp.params.file import Params

if TYPE_CHECKING:
    from arrivals import Arrivals, Coloured

ROOT = Path(__file__).resolve().parent.parent

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)

FOREIGN = Normalization((0.9,), (0.1,))

SMALL = {
    "seed": 0,
    "selected": ["1pct"],
    "data": {"max_train_images": 300},
    "model": {"width": 16, "depth": 3, "heads": 2},
    "contrastive": {"objective": "mocov3", "projector_hidden": 32, "projector_dim": 16, "predictor_hidden": 32},
    "mim": {"epochs": 2, "warmup_epochs": 1, "decoder_width": 16},
    "cl": {"epochs": 2, "base_lr": 8e-3, "warmup_epochs": 1},
    "graft": {
        "epochs": 2,
        "warmup_epochs": 1,
        "stage_lr": {"base_lrs": [8e-3, 8e-3, 8e-3]},
        "layer_decay": {"base_lr": 8e-3},
        "scratch_end": {"lower_blocks": 2},
        "cl_end": {"lower_blocks": 2},
    },
    "joint": {"epochs": 2, "warmup_epochs": 1},
    "reverse": {"epochs": 2, "warmup_epochs": 1},
    "linear": {"epochs": 10},
    "finetune": {"10pct": {"epochs": 2, "warmup_epochs": 1, "base_lr": 2e-2}},
    "run": {"device": "cpu", "print_every_s": 1000},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes tests/pretrain/golden_losses.json."""
    parser.addoption("--write-golden", action="store_true", help="write the golden losses instead of comparing them")


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay nested changes over a nested base."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def prepare_all(params: Params, folder: Path, seed: int = 0) -> LabelledImages:
    """Prepare images and labels into `folder`/prepared and `folder`/labels, as the two stages do."""
    images, labels = folder / "prepared", folder / "labels"
    for path in (images, labels):
        path.mkdir(parents=True)
    prepare(params.data, seed, images, folder / "held_out.csv")
    write_labels(params.labels, params.data, Images(images), seed, labels)
    return LabelledImages(images, labels)


class Silent:
    """An observer that takes no notice."""

    def log_epoch(self, values: dict[str, float]) -> None:
        """Take nothing."""


@pytest.fixture
def values() -> dict[str, Any]:
    """The small parameter file as nested values."""
    return merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL)


@pytest.fixture
def params(values: dict[str, Any]) -> Params:
    return Params.model_validate(values)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """LabelledImages digits with their labels, 300 for training and test."""
    folder = tmp_path_factory.mktemp("data")
    small = merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL)
    return prepare_all(Params.model_validate(small), folder)


@pytest.fixture(scope="session")
def encoder_folder(prepared: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder folder of an arm whose encoder is small and untrained."""
    small = Params.model_validate(merged(yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()), SMALL))
    folder = tmp_path_factory.mktemp("arm") / "encoder"
    torch.manual_seed(0)
    encoder = build_encoder(small.model, small.data)
    save_encoder(folder, encoder, small.model, small.data, prepared.normalization, {"metrics": {}})
    save_tensors({}, folder.parent / HEADS)
    return folder


@pytest.fixture
def mim_project(tmp_path: Path, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a project whose only arm is `mim`, without parameters and images."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "DVC_STAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(encoder_folder.parent, tmp_path / "models" / "mim")
    return tmp_path


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> "Coloured":
    """Coloured images with labels, some without, and two encoders to start from."""
    from arrivals import prepared_in_colour  # which imports this module

    return prepared_in_colour(tmp_path_factory.mktemp("coloured"))


@pytest.fixture(scope="session")
def recorded(coloured: "Coloured", tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Arrivals]":
    """Whole trainings by their name in `arrivals.ARMS`, each recorded once."""
    from arrivals import arriving

    @functools.cache
    def of(name: str) -> "Arrivals":
        with arriving() as trainings:
            coloured.train(name, tmp_path_factory.mktemp(name))
        (arrivals,) = trainings
        return arrivals

    return of


@pytest.fixture
def foreign_folder(encoder_folder: Path, tmp_path: Path) -> Path:
    """The encoder folder of an arm that was trained on images of other statistics, `FOREIGN`."""
    folder = tmp_path / "foreign" / "encoder"
    shutil.copytree(encoder_folder.parent, folder.parent)
    config = json.loads((folder / CONFIG).read_text())
    config["pretrained_cfg"] |= {"mean": FOREIGN.mean, "std": FOREIGN.std}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def is_foreign(images: Tensor) -> bool:
    """Whether an encoder's input is prepared images, black to white, that the statistics `FOREIGN` normalise."""
    pixels = images * FOREIGN.std[0] + FOREIGN.mean[0]
    return bool((pixels > -1e-3).all() and (pixels < 1 + 1e-3).all() and pixels.min() < 0.2)


@pytest.fixture(autouse=True, scope="module")
def own_tracking_store() -> Iterator[None]:
    """Forget the store of the module before: MLflow keeps the address that it opened last in the environment."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Begin a test with a seed. Leave torch as it was: a training asks for deterministic algorithms."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def photographs(tmp_path: Path, values: dict[str, Any]) -> Images:
    """Images of several sizes, kept encoded."""
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "source" / "train" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + i, 30 + 2 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    data = merged(values["data"], {"source": str(tmp_path / "source"), "channels": 3, "max_train_images": None})
    (tmp_path / "prepared").mkdir()
    prepare(DataParams.model_validate(data), 0, tmp_path / "prepared", tmp_path / "held_out.csv")
    return Images(tmp_path / "prepared")
