"""Fine-tuning: the whole encoder is trained on all labels or on few.

The recipe is MAE's (He et al. 2022, appendix A.1, table 9). LGP uses it with its own learning rates and layer decay.
The parts come from timm. With `from_first_fc` the classifier sits on the first layer of the contrastive projector, as
in LGP at 10 % of labels. An arm without a projector (MIM) has its classifier on the encoder, and its metric `first_fc`
is 0.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, str_to_pil_interp
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from lgp.compute.device import choose_device
from lgp.compute.distributed import agree, joined, rank, world_size
from lgp.compute.launch import WorkerDone, launched_rank
from lgp.compute.precision import choose_precision, place
from lgp.compute.randomness import Stream, seeded
from lgp.data.conversion import MODES
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.errors import Diverged, LgpError, check_disk_space
from lgp.evaluate.outcome import Logits, Outcome, best_on_val, over_subsets, rank_on_val
from lgp.features.extraction import Running, extract
from lgp.models.classifier_folder import Classifier
from lgp.models.encoder_folder import images_for, load_encoder, read_config
from lgp.models.files import ENCODER, WEIGHTS
from lgp.models.heads_file import load_first_fc
from lgp.params.evaluate import FineTuneParams, SemiParams
from lgp.pretrain.arm import Session
from lgp.training.loop import Epoch, Observer, Trainer
from lgp.training.optimizer import adamw, peak_rate, warmup_cosine, whole_warmup_steps

BETAS = (0.9, 0.999)  # MAE, table 9
STATE_BYTES_PER_WEIGHT_BYTE = 2 * 3  # two resume states, each with the weight and two moments


@dataclass(frozen=True)
class OneOfMany:
    """The observer of one of several trainings in a row. Epoch numbers continue after those of earlier trainings."""

    observer: Observer
    before: int

    def log_epoch(self, values: Epoch) -> None:
        """Log an epoch under its number among those of all trainings."""
        self.observer.log_epoch(values | {"epoch": values["epoch"] + self.before})


class LabelledCrops(CropDataset):
    """Crops of labelled images, with RandAugment on each."""

    data: LabelledImages

    def __init__(
        self, data: LabelledImages, recipe: FineTuneParams, batch_size: int, stream: Stream, ids: np.ndarray
    ) -> None:
        super().__init__(data, recipe.views, 1, batch_size, stream, ids)
        self.augment = RandAugmentation.of(recipe.rand_augment, recipe, data)

    def read(self, step: int, rows: slice) -> Tensor:
        """Return the augmented crops of some rows of a step's whole batch."""
        crops = super().read(step, rows)
        if self.augment is not None:
            self.augment.apply(crops[:, 0], self.stream, step, rows.start)
        return crops

    def labels(self, batch: Batch) -> Tensor:
        """Return the labels of a batch's images, (rows,)."""
        return torch.from_numpy(self.data.labels[self.ids_of(batch.step)[batch.rows]])


@dataclass(frozen=True)
class RandAugmentation:
    """timm's RandAugment for crops of prepared images.

    Attributes:
        augment: takes and gives a coloured image of Pillow.
        mode: Pillow's name of the images' pixels.
    """

    augment: RandAugment
    mode: str

    @classmethod
    def of(cls, description: str | None, recipe: FineTuneParams, data: LabelledImages) -> "RandAugmentation | None":
        """Return the one of timm's `description`, with the interpolation of a recipe; None without a description."""
        if description is None:
            return None
        # empty pixels after a rotation or a shift take the mean colour; colour and shift are as in timm's own pipeline
        colour, shift = tuple(round(255 * mean) for mean in (data.mean * 3)[:3]), round(0.45 * data.image_size)
        resampling = str_to_pil_interp(recipe.interpolation)
        hparams = {"img_mean": colour, "translate_const": shift, "interpolation": resampling}
        augment: RandAugment = rand_augment_transform(description, hparams)
        for operation in augment.ops:
            if operation.name.startswith("Posterize"):
                # at full strength timm asks for 0 bits, but Pillow needs at least 1
                operation.level_fn = functools.partial(_one_bit_or_more, operation.level_fn)
        return cls(augment, MODES[data.channels])

    def apply(self, crops: Tensor, stream: Stream, step: int, first: int) -> None:
        """Augment crops (rows, C, S, S) uint8 in place. `first` is the place of the first of them in the batch."""
        for row, crop in enumerate(crops):
            image = Image.fromarray(crop.permute(1, 2, 0).squeeze(-1).numpy()).convert("RGB")
            with stream.seeded("rand_augment", step, first + row):
                augmented = self.augment(image).convert(self.mode)
            crops[row] = torch.from_numpy(np.atleast_3d(np.array(augmented))).permute(2, 0, 1)


def _one_bit_or_more(bits_of: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    return (max(bits_of(level, hparams)[0], 1),)


@dataclass(frozen=True)
class Trial:
    """One training: its number among all, the number of its subset, and its rate per 256 images."""

    number: int
    subset: int
    base_lr: float


@dataclass(frozen=True)
class FineTuning:
    """The inputs that all trainings share."""

    arm: Path
    data: LabelledImages
    recipe: FineTuneParams
    session: Session
    device: torch.device
    first_fc: Tensor | None

    @classmethod
    def of(cls, arm: Path, data: LabelledImages, recipe: FineTuneParams, session: Session) -> "FineTuning":
        """Open what trainings from the encoder of `arm` share."""
        run, data = session.params.run, images_for(arm / ENCODER, data)
        data.keep_decoded(run.decoded_gib * 2**30)
        first_fc = _first_fc(arm) if recipe.from_first_fc else None
        return cls(arm, data, recipe, session, choose_device(run), first_fc)

    def check_disk(self, bytes_per_weight_byte: int) -> None:
        """Raise `LgpError` where the disk has no room for the states of all trainings: they stay until all are done."""
        store = self.session.store
        of_states = bytes_per_weight_byte * (self.arm / ENCODER / WEIGHTS).stat().st_size
        there = sum(file.stat().st_size for file in store.folder.rglob("state-*.pt"))
        check_disk_space(store.folder, max(of_states - there, 0))


def finetune(
    arm: Path, data: LabelledImages, subsets: list[np.ndarray], recipe: FineTuneParams, session: Session
) -> Outcome:
    """Fine-tune an arm's encoder on each subset of labelled images, each time from the arm's weights.

    With several rates, every rate trains on every subset. The rate with the best mean accuracy on val is taken, the
    first of equal ones. A rate whose training diverges is left out. Each training has its own resume state, so a
    finished one is not repeated.

    Args:
        arm: folder of the arm, with `encoder/`, and with heads for `from_first_fc`.
        data: images and labels.
        subsets: arrays of image ids, all within the training part; a single array for all labels.
        recipe: epochs, rates, augmentation.
        session: seed, `run`, resume states and observer. Epoch numbers continue over the trainings.

    Raises:
        LgpError: a batch cannot be divided, the disk is full, or a training fails.
        Diverged: every rate diverged.
    """
    shared = FineTuning.of(arm, data, recipe, session)
    shared.check_disk(STATE_BYTES_PER_WEIGHT_BYTE * len(recipe.base_lrs) * len(subsets))
    tried: dict[float, Outcome] = {}
    diverged, flops = [], 0
    with joined("finetune", shared.device):
        for trial, base_lr in enumerate(recipe.base_lrs):
            try:
                outcome, of_rate = _try_rate(shared, subsets, trial, base_lr)
            except Diverged as e:
                diverged.append(e)
                continue
            flops += of_rate
            if rank() == 0:
                tried[base_lr] = outcome
        if len(diverged) == len(recipe.base_lrs):
            raise diverged[-1]
        if rank() > 0:
            raise WorkerDone
    for reason in diverged:
        print(f"warning: finetune: a rate is left out: {reason}", flush=True)
    chosen, of_choice = _choose_rate(tried)
    more = {"train/pflop": round(flops / 1e15, 9), "first_fc": float(shared.first_fc is not None)}
    return replace(chosen, metrics=chosen.metrics | of_choice | {"diverged": float(len(diverged))} | more)


def _try_rate(shared: FineTuning, subsets: list[np.ndarray], trial: int, base_lr: float) -> tuple[Outcome, int]:
    """Train at one rate on every subset; return the outcome, which is empty but in the first process, and the FLOPs."""
    scored, kept, flops = [], None, 0
    for number, ids in enumerate(subsets):
        if rank() == 0:
            said = f"rate {base_lr:g}, subset {number + 1} of {len(subsets)}, {len(ids)} labels"
            print(f"finetune: {shared.arm.name}, {said}", flush=True)
        model, of_training = fit(shared, Trial(trial * len(subsets) + number, number, base_lr), ids)
        flops += of_training
        predicted = predict(model, shared) if rank() == 0 else None
        if agree(int(predicted is not None and not predicted.finite)):
            raise Diverged(
                f"finetune: the predictions are not finite at the rate {base_lr:g} per 256 images: lower the learning "
                "rate of finetune"
            )
        if predicted is not None:
            temperature = predicted.temperature_on_val()
            scored.append(predicted.scored(temperature))
            if best_on_val(scored) == number:
                kept = kept_classifier(model, shared.recipe, temperature)
    return over_subsets(scored, len(subsets[0]), kept) if scored else Outcome({}, pd.DataFrame()), flops


def _choose_rate(tried: Mapping[float, Outcome]) -> tuple[Outcome, dict[str, float]]:
    """Return the outcome that is best on val, and metrics of the choice: `base_lr`, and val's accuracy of each rate.

    Args:
        tried: base learning rate → outcome, in the order of the recipe. The first of equal ones is taken.
    """
    best = max(tried, key=lambda rate: rank_on_val(tried[rate].metrics))
    at_rates = {f"val/top1_at_{rate:g}": outcome.metrics["val/top1"] for rate, outcome in tried.items()}
    at_rates = at_rates if len(tried) > 1 else {}
    return tried[best], {"base_lr": best} | at_rates


def fit(shared: FineTuning, trial: Trial, ids: np.ndarray) -> tuple[VisionTransformer, int]:
    """Train a trial on the images `ids`; return the classifier and the FLOPs it took."""
    data, recipe, session, device = shared.data, shared.recipe, shared.session, shared.device
    seed, run, classes = session.params.seed, session.params.run, len(data.classes)
    name = f"finetune/{trial.subset}"  # each subset has its own random draws, the same for every rate
    with seeded(seed, f"{name}/init"):
        model = build_classifier(shared.arm / ENCODER, classes, recipe, shared.first_fc)
    precision = choose_precision(run, device, model.embed_dim)
    place(model, device, precision)
    batch_size = batch_size_for(len(ids), recipe, world_size() * run.accumulate.get("finetune", 1))
    crops = LabelledCrops(data, recipe, batch_size, Stream(seed, name), ids)
    crops.shard(rank(), world_size())
    rate, steps = peak_rate(trial.base_lr, batch_size), recipe.epochs * crops.steps_per_epoch
    optimizer = adamw(layer_decayed_groups(model, rate, recipe), BETAS)
    warmup_steps = whole_warmup_steps(recipe.warmup_epochs, crops.steps_per_epoch, steps)
    mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
    erase = RandomErasing(recipe.random_erasing, mode="pixel", device=device.type)

    def loss_of(batch: Batch) -> Tensor:
        images, labels = data.normalize(batch.crops[:, 0]), crops.labels(batch).to(device)
        # each process draws its own mixing partners and dropped blocks
        with seeded(seed, f"{name}/step", batch.step, batch.rows.start):
            if recipe.random_erasing:
                images = erase(images)
            if recipe.mixup or recipe.cutmix:
                images, labels = mix(images, labels)
                return F.cross_entropy(model(images), labels)  # of soft labels, already smoothed
            return F.cross_entropy(model(images), labels, label_smoothing=recipe.label_smoothing)

    trainer = Trainer(
        name="finetune",
        model=model,
        loss_of=loss_of,
        crops=crops,
        optimizer=optimizer,
        schedule=warmup_cosine(optimizer, steps, warmup_steps),
        epochs=recipe.epochs,
        device=device,
        precision=precision,
        settings=run,
        store=session.store.part(f"training{trial.number}"),
        observer=OneOfMany(session.observer, trial.number * recipe.epochs),
        clip_norm=recipe.clip_norm,
    )
    return model, trainer.fit().train_flops


def batch_size_for(images: int, recipe: FineTuneParams, parts: int) -> int:
    """Return `batch_size`, or the number of images where that is smaller. With mixup it is an even number.

    It does not depend on the number of processes or on accumulation.

    Raises:
        LgpError: the batch cannot be cut into `parts` equal parts, one per process and accumulated part.
    """
    pair = 2 if recipe.mixup or recipe.cutmix else 1
    batch_size = min(recipe.batch_size, images) // pair * pair
    if not batch_size or batch_size % (parts * pair):
        raise LgpError(
            f"{batch_size} labelled images a batch cannot be cut into {parts} equal parts (of "
            "run.processes and run.accumulate.finetune; mixup takes an even number each): lower these"
        )
    return batch_size


def build_classifier(
    encoder: Path, classes: int, recipe: FineTuneParams, first_fc: Tensor | None = None
) -> VisionTransformer:
    """Build timm's classifier on the weights of an encoder folder.

    With `average` the patch tokens are averaged and then pass a new norm, as in MAE. The encoder's norm is left out.

    Args:
        encoder: folder of the encoder.
        classes: of the head, which starts near zero (N(0, (2e-5)²), MAE's released code).
        recipe: pooling and drop path.
        first_fc: weights (hidden, width) of a layer before the head; None: no such layer.
    """
    config = read_config(encoder)
    model: VisionTransformer = timm.create_model(
        config["architecture"],
        num_classes=classes,
        drop_path_rate=recipe.drop_path,
        **config["model_args"] | _pooling(recipe, config["global_pool"]),
    )
    missing, unexpected = model.load_state_dict(load_encoder(encoder).state_dict(), strict=False)
    assert all(name.startswith(("head.", "fc_norm.")) for name in missing), missing
    assert all(name.startswith("norm.") for name in unexpected), unexpected
    if first_fc is not None:
        layer = nn.Linear(first_fc.shape[1], first_fc.shape[0], bias=False)
        layer.weight.data.copy_(first_fc)
        model.head = nn.Sequential(layer, nn.Linear(first_fc.shape[0], classes))
    head = model.head if first_fc is None else model.head[1]
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)
    return model


def kept_classifier(model: VisionTransformer, recipe: FineTuneParams, temperature: float) -> Classifier:
    """Return the weights of a trained model, on the CPU. Two layers of its head become one, as none lies between."""
    weights = {name: tensor.detach().float().cpu().clone() for name, tensor in model.state_dict().items()}
    if "head.0.weight" in weights:
        first, second = weights.pop("head.0.weight").double(), weights.pop("head.1.weight").double()
        weights |= {"head.weight": (second @ first).float(), "head.bias": weights.pop("head.1.bias")}
    for name in ("head.weight", "head.bias"):
        weights[name] = weights[name] / temperature
    pooling = {"global_pool": model.global_pool}
    return Classifier(temperature, model=weights, model_args=pooling, interpolation=recipe.interpolation)


def _pooling(recipe: FineTuneParams, of_encoder: str) -> dict[str, str]:
    """Return timm's argument for how the tokens become features. An encoder without a class token keeps its own."""
    return {"global_pool": "token" if recipe.pool == "class_token" else "avg"} if of_encoder == "token" else {}


def layer_decayed_groups(
    model: VisionTransformer, rate: float, recipe: FineTuneParams | SemiParams
) -> list[dict[str, Any]]:
    """Group a classifier's parameters by layer: timm's layer decay, each group with its own rate.

    The head takes `rate`. Each block takes `layer_decay` times the rate of the layer above. The final norm takes the
    rate of the last block (in MAE's released code that of the head). Biases, norms, class token and positions have no
    weight decay, as in MAE.
    """
    groups = param_groups_layer_decay(
        model, recipe.weight_decay, model.no_weight_decay(), layer_decay=recipe.layer_decay
    )
    return [
        {"params": group["params"], "weight_decay": group["weight_decay"], "lr": rate * group["lr_scale"]}
        for group in groups
    ]


def _first_fc(arm: Path) -> Tensor | None:
    """Return the first layer of an arm's contrastive projector, (hidden, width)."""
    first_fc = load_first_fc(arm)
    if first_fc is None and launched_rank() == 0:
        print(f"finetune: {arm.name} has no contrastive projector, its classifier sits on the encoder", flush=True)
    return first_fc


def predict(model: nn.Module, shared: FineTuning, splits: Sequence[str] = ("val", "test")) -> Logits:
    """Return logits of whole images, on val and test."""
    data = shared.data
    model.eval()

    def encode(images: Tensor) -> Tensor:
        return model(images.to(shared.device)).float()

    running = Running.of(shared.session.params.run, shared.device)
    ids = {split: data.ids(split) for split in splits}
    logits = {split: extract(encode, data, i, shared.recipe.interpolation, running) for split, i in ids.items()}
    return Logits(logits, {split: data.labels[i] for split, i in ids.items()}, ids)
