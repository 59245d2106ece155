"""What arrives in a training: recorded at the model and at the optimizer, and made again by a slow path of its own.

A test compares the two. The recording leaves the training as it is. The slow path goes image by image, with Pillow's
pixels and torchvision's operations. It shares with the code only what is drawn: order, boxes, flips, colours.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, Silent, merged, prepare_all
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from lgp.compute.randomness import Stream
from lgp.data.labels import LabelledImages
from lgp.data.views import ColorJitter, random_boxes, random_flips
from lgp.models.encoder_folder import save_encoder
from lgp.models.vit import build_encoder, init_encoder_as_mae
from lgp.params.file import Params
from lgp.params.pretrain import SmallViews, ViewParams
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.controls import pretrain_joint, pretrain_reverse
from lgp.pretrain.graft import pretrain_graft
from lgp.pretrain.mim import pretrain_mim
from lgp.training.loop import Trainer
from lgp.training.resume_states import StateStore

# every arm has numbers of its own, so that none can take another's unnoticed
SETTINGS: dict[str, Any] = {
    "data": {"channels": 3, "max_train_images": None},
    "labels": {"shares": {"10pct": 0.1}, "shots": [4]},
    "few_labels": ["10pct"],
    "contrastive": {
        "freeze_patch_embed": True,
        "momentum": 0.9,
        "temperature": 0.3,
        "views": {
            "crop_scale_min": 0.3, "flip_p": 0.5, "jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4,
            "saturation": 0.2, "hue": 0.1, "grayscale_p": 0.2, "blur_p": [1.0, 0.1], "solarize_p": [0.0, 0.2],
        },
    },
    "mim": {
        "epochs": 2, "batch_size": 8, "base_lr": 0.01, "warmup_epochs": 1, "weight_decay": 0.01,
        "crop_scale_min": 0.5, "flip_p": 0.5, "mask_ratio": 0.75,
    },
    "cl": {"epochs": 3, "batch_size": 10, "base_lr": 0.02, "warmup_epochs": 1, "weight_decay": 0.02},
    "graft": {
        "epochs": 4, "batch_size": 16, "warmup_epochs": 2, "weight_decay": 0.03,
        "stage_lr": {"base_lrs": [0.003, 0.006, 0.03]}, "layer_decay": {"base_lr": 0.05, "decay": 0.5},
        "freeze": {"lower_blocks": 1}, "l1": {"lower_blocks": 2, "weight": 1e-3},
        "scratch_end": {"lower_blocks": 1}, "cl_end": {"lower_blocks": 2},
        "lora": {"rank": 4, "alpha": 2, "free_blocks": 1},
    },
    "joint": {
        "epochs": 2, "batch_size": 12, "base_lr": 0.04, "warmup_epochs": 1, "weight_decay": 0.04, "mim_weight": 0.7,
    },
    "reverse": {
        "epochs": 3, "batch_size": 14, "base_lrs": [0.005, 0.01, 0.05], "warmup_epochs": 1, "weight_decay": 0.05,
    },
    "run": {"precision": "fp32", "threads": 1},
}  # fmt: skip

SMALL_VIEWS = {"count": 3, "size": 4, "crop_scale_min": 0.1, "crop_scale_max": 0.3, "blur_p": 0.4}
SWAV = {"prototypes": 12, "frozen": 0.3}
REFINE = {"neighbours": 3, "average": 0.5}

# the name of a training, with what it changes; its arm is the first word
ARMS: dict[str, dict[str, Any]] = {
    "mim": {},
    "cl": {},
    "cl_masked": {"contrastive": {"mask_ratio": 0.5, "freeze_patch_embed": False}},
    "cl_masked_keys": {"contrastive": {"mask_ratio": 0.5, "masked": "queries_and_keys"}},
    "cl_one_sided": {"contrastive": {"mask_ratio": 0.5, "masked": "one_sided"}},
    "cl_simclr": {"contrastive": {"objective": "simclr"}},
    "cl_vicreg": {"contrastive": {"objective": "vicreg"}},
    "cl_multi_crop": {"contrastive": {"small_views": SMALL_VIEWS}},
    "cl_simclr_multi_crop": {"contrastive": {"objective": "simclr", "small_views": SMALL_VIEWS}},
    "cl_vicreg_multi_crop": {"contrastive": {"objective": "vicreg", "small_views": SMALL_VIEWS}},
    "cl_swav": {"contrastive": {"objective": "swav", "swav": SWAV}},
    "cl_swav_multi_crop": {"contrastive": {"objective": "swav", "swav": SWAV, "small_views": SMALL_VIEWS}},
    "cl_refine": {"contrastive": {"objective": "refine", "refine": REFINE}},
    "graft_refine_multi_crop": {
        "graft": {"policy": ["layer_decay"]},
        "contrastive": {"objective": "refine", "refine": REFINE | {"heads": 2}, "small_views": SMALL_VIEWS},
    },
    "graft_stage_lr": {"graft": {"policy": ["stage_lr"]}},
    "graft_layer_decay": {"graft": {"policy": ["layer_decay"]}},
    "graft_freeze": {"graft": {"policy": ["stage_lr", "freeze"]}},
    "graft_l1": {"graft": {"policy": ["stage_lr", "l1"]}},
    "graft_scratch_end": {"graft": {"policy": ["stage_lr", "scratch_end"]}},
    "graft_cl_end": {"graft": {"policy": ["stage_lr", "cl_end"], "end": "cl"}},
    "graft_lora": {"graft": {"policy": ["stage_lr", "lora"]}},
    "graft_vicreg": {"graft": {"policy": ["stage_lr"]}, "contrastive": {"objective": "vicreg"}},
    "graft_simclr": {"graft": {"policy": ["stage_lr"]}, "contrastive": {"objective": "simclr"}},
    "graft_swav": {"graft": {"policy": ["stage_lr"]}, "contrastive": {"objective": "swav", "swav": SWAV}},
    "joint": {},
    "joint_vicreg": {"contrastive": {"objective": "vicreg"}},
    "reverse": {},
}

# as in the released code
INTERPOLATIONS = defaultdict(
    lambda: InterpolationMode.BILINEAR, dict.fromkeys(("mim", "reverse", "finetune"), InterpolationMode.BICUBIC)
)


def saved_encoder(folder: Path, params: Params, data: LabelledImages, seed: int) -> Path:
    """Write an encoder with random weights, norms included, into `folder`."""
    torch.manual_seed(seed)
    encoder = build_encoder(params.model, params.data)
    init_encoder_as_mae(encoder)
    with torch.no_grad():
        encoder.norm.weight.normal_()
    save_encoder(folder, encoder, params.model, params.data, data.normalization, {"metrics": {}})
    return folder


@dataclass(frozen=True)
class Coloured:
    """Prepared coloured images with labels, some without, and two encoders to start from."""

    values: dict[str, Any]
    data: LabelledImages
    mim: Path
    cl: Path

    def params(self, changes: dict[str, Any]) -> Params:
        """Return the parameters with changes."""
        return Params.model_validate(merged(self.values, changes))

    def session(self, changes: dict[str, Any], folder: Path) -> Session:
        """Return the inputs of a training. Resume states go into `folder`."""
        return Session(self.data, self.params(changes), StateStore(folder, "code"), Silent())

    def train(self, name: str, folder: Path, changes: dict[str, Any] | None = None) -> Pretrained:
        """Train one of `ARMS`."""
        session = self.session(merged(ARMS[name], changes or {}), folder)
        start = {"graft": [self.mim, self.cl], "reverse": [self.cl]}
        arm = name.split("_")[0]
        pretrain: Callable[..., Pretrained] = PRETRAIN[arm]
        return pretrain(session, *start.get(arm, []))


def prepared_in_colour(folder: Path) -> Coloured:
    """Prepare 60 images of 8×8 coloured squares of 4×4 in three classes, and 9 without a label, below `folder`."""
    rng, source = np.random.default_rng(0), folder / "source"
    of_part = {"train/a": 15, "train/b": 15, "train/c": 15, "test/a": 5, "test/b": 5, "test/c": 5, "unlabeled": 9}
    for part, count in of_part.items():
        (source / part).mkdir(parents=True)
        for i in range(count):
            # every channel has its own mean and deviation
            squares = rng.integers((0, 60, 0), (256, 256, 150), (4, 4, 3)).astype(np.uint8)
            Image.fromarray(squares.repeat(2, 0).repeat(2, 1)).save(source / part / f"{i}.png")
    preset = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text())
    values = merged(merged(merged(preset, SMALL), SETTINGS), {"data": {"source": str(source)}})
    params = Params.model_validate(values)
    data = prepare_all(params, folder)
    encoders = [saved_encoder(folder / arm / "encoder", params, data, seed) for seed, arm in enumerate(("mim", "cl"))]
    return Coloured(values, data, *encoders)


PRETRAIN: dict[str, Callable[..., Pretrained]] = {
    "mim": pretrain_mim,
    "cl": pretrain_cl,
    "graft": pretrain_graft,
    "joint": pretrain_joint,
    "reverse": pretrain_reverse,
}


@dataclass
class Step:
    """What arrived in a step: tensors at and from the modules by name, and at the optimizer.

    `inputs` and `outputs` have the tensors of each call of a module. The model's own name is "". Layers within blocks
    and heads are left out.
    """

    weights: dict[str, Tensor]
    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    rates: dict[str, float] = field(default_factory=dict)
    loss: float = math.nan
    training: bool = False


class Arrivals:
    """What arrived in one training, step by step."""

    def __init__(self, trainer: Trainer) -> None:
        """Listen to a training that has not begun."""
        self.trainer, self.model, self.optimizer = trainer, trainer.model, trainer.optimizer
        self.parameters = dict(self.model.named_parameters())  # some are merged at the end
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.steps: list[Step] = []
        self.after: dict[str, list[Tensor]] = defaultdict(list)  # the inputs of modules after the training
        self.ended = False
        for name, module in self.model.named_modules():
            if not any(part.isdigit() for part in name.split(".")):
                module.register_forward_hook(functools.partial(self._keep, name))
        self.optimizer.register_step_pre_hook(self._keep_rates)

    @property
    def start(self) -> dict[str, Tensor]:
        """The weights before the first step."""
        return self.steps[0].weights

    def grouped(self, key: str) -> dict[str, Any]:
        """Return what the optimizer's groups say under `key`, by the name of the parameter."""
        return {self.names[id(p)]: group[key] for group in self.optimizer.param_groups for p in group["params"]}

    def _keep(self, name: str, _: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [i.detach().clone() for i in inputs if isinstance(i, Tensor)]
        if self.ended:
            self.after[name] += tensors
            return
        self.steps[-1].inputs[name] += tensors
        if isinstance(output, Tensor):
            self.steps[-1].outputs[name].append(output.detach().clone())

    def _keep_rates(self, *_: Any) -> None:
        self.steps[-1].rates = self.grouped("lr")
        self.steps[-1].training = self.model.training


class EnoughError(Exception):
    """Ends a training early."""


@contextmanager
def arriving(most: int | None = None) -> Iterator[list[Arrivals]]:
    """Record every training in the block. Its end, and the block's, is after `most` steps, if given."""
    recorded: list[Arrivals] = []
    fit, step, backward = Trainer.fit, Trainer._step, Trainer._backward

    def watched_fit(trainer: Trainer) -> Any:
        recorded.append(Arrivals(trainer))
        progression = fit(trainer)
        recorded[-1].ended = True
        return progression

    def watched_step(trainer: Trainer, *rest: Any) -> None:
        weights = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
        recorded[-1].steps.append(Step(weights))
        step(trainer, *rest)
        if len(recorded[-1].steps) == most:
            raise EnoughError

    def watched_backward(trainer: Trainer, *rest: Any) -> Tensor:
        loss = backward(trainer, *rest)
        recorded[-1].steps[-1].loss = loss.item()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", watched_fit)
        patch.setattr(Trainer, "_step", watched_step)
        patch.setattr(Trainer, "_backward", watched_backward)
        try:
            yield recorded
        except EnoughError:
            pass
        finally:
            torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Slow:
    """The batches of a training, made image by image.

    Attributes:
        data: the images.
        ids: of an epoch.
        views: crops, flips and colours.
        number: of views of each image.
        batch_size: of the training.
        stream: of the training.
        interpolation: of the resizing.
        size: of the views in pixels; None: of the model.
    """

    data: LabelledImages
    ids: np.ndarray
    views: ViewParams
    number: int
    batch_size: int
    stream: Stream
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    size: int | None = None

    def small(self, views: SmallViews) -> "Slow":
        """Return the small views of the same images: with their own boxes, blur and size, never solarised."""
        of_small = self.views.model_copy(
            update={
                "crop_scale_min": views.crop_scale_min,
                "crop_scale_max": views.crop_scale_max,
                "blur_p": (views.blur_p, views.blur_p),
                "solarize_p": (0.0, 0.0),
            }
        )
        return replace(self, views=of_small, number=views.count, size=views.size)

    @property
    def steps_per_epoch(self) -> int:
        """The number of full batches."""
        return len(self.ids) // self.batch_size

    def ids_of(self, step: int) -> list[int]:
        """Return the images of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self.ids), generator=self.stream.generator("order", epoch)).tolist()
        return [int(self.ids[i]) for i in order[place * self.batch_size : (place + 1) * self.batch_size]]

    def crops(self, step: int, view: int) -> Tensor:
        """Return the crops of one view, (B, C, S, S) in [0, 1], in whole grey levels."""
        ids, rng = self.ids_of(step), self.stream.generator("crops" if self.size is None else "small crops", step)
        size, scale = self.size or self.data.image_size, (self.views.crop_scale_min, self.views.crop_scale_max)
        boxes = random_boxes(torch.from_numpy(self.data.sizes[ids]), self.number, scale[0], rng, scale[1])
        flips = random_flips(len(ids), self.number, self.views.flip_p, rng)
        crops = []
        for row, i in enumerate(ids):
            image = tvf.pil_to_tensor(self.data.open_image(i))
            crop = tvf.resized_crop(image, *boxes[row, view].tolist(), [size, size], self.interpolation)
            crops.append(tvf.horizontal_flip(crop) if flips[row, view] else crop)
        return torch.stack(crops).float() / 255

    def coloured(self, step: int, view: int) -> Tensor:
        """Return the crops of one contrastive view with the colours that are drawn for it."""
        crops, name = self.crops(step, view), "colours" if self.size is None else "small colours"
        kind = view if self.size is None else 0
        jitter = ColorJitter.draw(len(crops), kind, self.views, self.stream.generator(name, step, view))
        return torch.stack([jittered(crop, jitter, row) for row, crop in enumerate(crops)])

    def normalized(self, images: Tensor) -> Tensor:
        """Normalise by mean and deviation of the images of pre-training, measured here."""
        ids = np.flatnonzero(self.data.index["part"] == "train")
        pixels = np.stack([np.asarray(self.data.open_image(i)) for i in ids]).reshape(-1, self.data.channels) / 255
        mean, std = (torch.from_numpy(of(axis=0)).float()[:, None, None] for of in (pixels.mean, pixels.std))
        return (images - mean) / std


def jittered(image: Tensor, jitter: ColorJitter, row: int) -> Tensor:
    """Apply the colours of one row to one image (C, S, S), operation by operation, with torchvision."""
    adjust = [tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation]
    if jitter.jittered[row]:
        for number in jitter.order[row].tolist():
            if number == 3:
                image = tvf.adjust_hue(image, float(jitter.shift[row]))
            else:
                image = adjust[number](image, float(jitter.factors[row, number]))
    if jitter.grey[row]:
        image = tvf.rgb_to_grayscale(image, 3)
    if jitter.blur[row]:
        kernel = 2 * min(6, image.shape[-1] - 1) + 1  # three times the largest sigma to each side, within the image
        image = tvf.gaussian_blur(image, [kernel, kernel], [float(jitter.sigma[row])] * 2)
    if jitter.solarize[row]:
        image = tvf.solarize(image, 0.5)
    return image


def same(found: Tensor, expected: Tensor, levels: float = 1) -> bool:
    """Say whether normalised images are equal up to a rounding to grey levels; 2 % of the values may differ more.

    A level is 1/255 of the range, at most 1/40 of a deviation.
    """
    far = (found - expected).abs() > levels / 40
    return found.shape == expected.shape and far.double().mean().item() <= 0.02
