"""Semi-supervised fine-tuning (Semi-ViT, Cai et al. 2022): a teacher labels the images that have no label.

Fine-tuning with the labels comes first, on each subset anew. Its model becomes student and teacher. In each step the
teacher predicts a weak view of unlabelled images (crop and flip). The student learns the predicted classes on a strong
view (RandAugment, colours) whose images are mixed in pairs, and beside it the labelled images. After each step the
teacher follows the student: it is the exponential average of its weights. The teacher is what is kept.

Unlabelled are the images of the training part that are not in the subset. Their labels, if they have any, are not read.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from lgp.compute.distributed import agree, average, joined, rank, world_size
from lgp.compute.launch import WorkerDone
from lgp.compute.precision import choose_precision, in_single_precision
from lgp.compute.randomness import Stream, seeded
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.data.views import ColorJitter, color_jitter
from lgp.errors import Diverged, LgpError
from lgp.evaluate.fine_tuning import (
    BETAS,
    FineTuning,
    LabelledCrops,
    OneOfMany,
    RandAugmentation,
    Trial,
    fit,
    kept_classifier,
    layer_decayed_groups,
    predict,
)
from lgp.evaluate.outcome import Logits, Outcome, Scored, best_on_val, over_subsets, percent
from lgp.models.averaging import decay_over, follow
from lgp.models.classifier_folder import Classifier
from lgp.models.files import encoder_digest
from lgp.params.arms import how_to_evaluate
from lgp.params.evaluate import FineTuneParams, SemiParams
from lgp.pretrain.arm import Session
from lgp.training.loop import Epoch, Progression, Trainer
from lgp.training.optimizer import adamw, peak_rate, warmup_cosine, whole_warmup_steps

# two resume states each: of fine-tuning with weight and two moments, then of student, teacher and two moments
STATE_BYTES_PER_WEIGHT_BYTE = 2 * 3 + 2 * 4
CUT_SHARE = {"none": 0.0, "mixup": 0.0, "both": 0.5, "cutmix": 1.0}  # of the mixed images, by `mixing`


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning with labels, at the rate per 256 images that val chose, and how it goes on without."""

    supervised: FineTuneParams
    base_lr: float
    semi: SemiParams

    @property
    def rate(self) -> float:
        """The rate per 256 labelled images at which it goes on: that of fine-tuning, unless one is given."""
        return self.base_lr if self.semi.base_lr is None else self.semi.base_lr


class SelfTraining(nn.Module):
    """A student, and its teacher: the exponential average of the student's weights. No gradient reaches the teacher.

    The buffer `kept` has the sum, over the calls of `count` in the running epoch, of the share of images that are kept,
    and the number of these calls.
    """

    kept: Tensor

    def __init__(self, start: VisionTransformer) -> None:
        """Let both start from a fine-tuned model."""
        super().__init__()
        self.student, self.teacher = start, copy.deepcopy(start).requires_grad_(False)
        self.register_buffer("kept", torch.zeros(2, dtype=torch.float64))

    def train(self, mode: bool = True) -> "SelfTraining":
        """Set the student's mode. The teacher always predicts as in evaluation, without drop path."""
        super().train(mode)
        self.teacher.eval()
        return self

    def count(self, kept: Tensor) -> None:
        """Count the kept images among those of all processes. `kept` is (N,) bool."""
        share = average(kept.double().mean())
        self.kept += torch.stack([share, torch.ones_like(share)])

    def share_kept(self) -> float:
        """Return the share of kept images since the last call, in percent."""
        shares, calls = self.kept.tolist()
        self.kept.zero_()
        return 100 * shares / calls


class SemiCrops(CropDataset):
    """The crops of labelled and unlabelled images of each step: item s is (rows, 1 + 2·µ, C, S, S) uint8.

    A row has the crop of a labelled image, µ weak crops and the µ strong crops of the same unlabelled images. Images of
    a row stay together, so the number of processes or of accumulated parts changes no batch. An epoch is a random order
    of the unlabelled images. The labelled images have epochs of their own.
    """

    def __init__(
        self, labelled: LabelledCrops, data: LabelledImages, recipe: Recipe, stream: Stream, unlabelled: np.ndarray
    ) -> None:
        """Add µ of the images `unlabelled` to each of the crops `labelled`."""
        self.ratio, self.labelled = recipe.semi.unlabelled_ratio, labelled
        batch_size = labelled.batch_size * self.ratio
        super().__init__(data, recipe.supervised.views, 2, batch_size, stream, unlabelled)
        self.rows = labelled.rows
        self.augment = RandAugmentation.of(recipe.semi.rand_augment, recipe.supervised, data)

    def shard(self, rank: int, processes: int) -> None:
        """Read only the rows of process `rank` from now on."""
        self.labelled.shard(rank, processes)
        self.rows = self.labelled.rows

    def read(self, step: int, rows: slice) -> Tensor:
        """Return the crops of some labelled images of a step's whole batch, and of the unlabelled ones beside them."""
        unlabelled = slice(rows.start * self.ratio, rows.stop * self.ratio)
        crops = super().read(step, unlabelled)
        if self.augment is not None:
            self.augment.apply(crops[:, 1], self.stream, step, unlabelled.start)
        of_rows = crops.unflatten(0, (-1, self.ratio)).transpose(1, 2).flatten(1, 2)
        return torch.cat([self.labelled.read(step, rows), of_rows], dim=1)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: a labelled image and both crops of each unlabelled one."""
        return self.labelled.row_bytes + self.ratio * super().row_bytes

    def batch(self, step: int, crops: Tensor) -> Batch:
        """Return the crops of a step as a `Batch` of rows."""
        return self.labelled.batch(step, crops)


@dataclass(frozen=True)
class Mixing:
    """How each of N unlabelled images is mixed with its partner.

    Attributes:
        partner: (N,) the place of the other image.
        cut: (N,) bool, whether a box of the partner is pasted (cutmix); otherwise pixels are averaged (mixup).
        centre: (N, 2) row and column of the box's centre, in pixels.
    """

    partner: Tensor
    cut: Tensor
    centre: Tensor

    @classmethod
    def draw(cls, rows: int, semi: SemiParams, size: int, rng: Generator) -> "Mixing":
        """Draw for `rows` rows of µ images of `size` pixels. The partner is the next image of the row.

        The order of the images is random, so the partner is too. Without mixing an image is its own partner.
        """
        number = torch.arange(rows * semi.unlabelled_ratio)
        of_rows = number.view(rows, -1)
        partner = number if semi.mixing == "none" else of_rows.roll(-1, dims=1).flatten()
        cut = torch.rand(len(number), generator=rng) < CUT_SHARE[semi.mixing]
        return cls(partner, cut, torch.randint(size, (len(number), 2), generator=rng))

    def of_rows(self, rows: slice, ratio: int) -> "Mixing":
        """Return the mixing of some rows of µ images."""
        images = slice(rows.start * ratio, rows.stop * ratio)
        return Mixing(self.partner[images] - images.start, self.cut[images], self.centre[images])

    def to(self, device: torch.device) -> "Mixing":
        """Return the same on a device."""
        return Mixing(*(tensor.to(device, non_blocking=True) for tensor in (self.partner, self.cut, self.centre)))


def mixed_by_confidence(
    images: Tensor, targets: Tensor, confidence: Tensor, mixing: Mixing
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix pairs of unlabelled images: probabilistic pseudo mixup (Semi-ViT, section 3.3).

    The share of an image in its pair is its own share of the two confidences, λ = c_i / (c_i + c_j). With cutmix the
    box has the area of 1 - λ, and λ is then corrected for rounding and for what the border cuts off. A pair is as sure
    as the surer of its images, so an image of low confidence counts too, with a small share.

    Args:
        images: (N, C, S, S).
        targets: (N, K) probabilities of the classes.
        confidence: (N,) above 0.
        mixing: who is mixed with whom, and how.

    Returns:
        Images, targets and confidence of the same shapes.
    """
    other = mixing.partner
    share = confidence / (confidence + confidence[other])
    own = torch.where(mixing.cut[:, None, None], ~_boxes(share, mixing.centre, images.shape[-1]), share[:, None, None])
    images = torch.lerp(images[other], images, own[:, None].to(images.dtype))
    share = own.mean((1, 2))[:, None]
    targets = share * targets + (1 - share) * targets[other]
    return images, targets, torch.maximum(confidence, confidence[other])


def _boxes(share: Tensor, centre: Tensor, size: int) -> Tensor:
    """Return the pixels of each box, (N, S, S) bool. Its side is √(1 - share) of the image's, and the border cuts it.

    Sides are rounded as in timm.
    """
    side = (size * (1 - share).sqrt()).long()[:, None]
    low, high = centre - side // 2, centre + (side + 1) // 2
    place = torch.arange(size, device=share.device)
    inside = (place >= low[..., None]) & (place < high[..., None])  # (N, 2, S): rows, columns
    return inside[:, 0, :, None] & inside[:, 1, None]


@in_single_precision
def semi_supervised_loss(
    labelled: Tensor, labels: Tensor, unlabelled: Tensor, targets: Tensor, confidence: Tensor, recipe: Recipe
) -> Tensor:
    """Return the cross-entropy of labelled images, plus `weight` times that of unlabelled ones (Semi-ViT, section 3).

    The mean of the unlabelled ones is over all N·µ. Those below the threshold count 0.

    Args:
        labelled: (N, K) logits of the student.
        labels: (N,) classes.
        unlabelled: (N·µ, K) logits of the student.
        targets: (N·µ, K) probabilities of the classes, from the teacher.
        confidence: (N·µ,) of the teacher.
        recipe: threshold, weight and label smoothing.
    """
    smoothing, semi = recipe.supervised.label_smoothing, recipe.semi
    of_images = F.cross_entropy(unlabelled, targets, reduction="none", label_smoothing=smoothing)
    kept = confidence >= semi.threshold
    return F.cross_entropy(labelled, labels, label_smoothing=smoothing) + semi.weight * (of_images * kept).mean()


def chosen_rate(metrics: Mapping[str, Any], arm: str, labels: str, encoder: Path, recipe: FineTuneParams) -> float:
    """Return the rate that `lgp finetune` chose for an arm and labels, from its metrics.

    Raises:
        LgpError: the metrics are of another encoder, or the recipe does not have that rate any more.
    """
    again = f"{how_to_evaluate(arm, f'finetune-{labels}')} again"
    if metrics["encoder"] != encoder_digest(encoder):
        raise LgpError(f"{arm} was fine-tuned with {labels} before its encoder was trained anew: {again}")
    if metrics["base_lr"] not in recipe.base_lrs:
        raise LgpError(
            f"{arm} was fine-tuned with {labels} at the rate {metrics['base_lr']:g}, which is not among "
            f"finetune.{labels}.base_lr {recipe.base_lrs}: {again}"
        )
    return float(metrics["base_lr"])


def semi_supervise(
    arm: Path, data: LabelledImages, subsets: list[np.ndarray], recipe: Recipe, session: Session
) -> Outcome:
    """Fine-tune an arm's encoder on each subset of labelled images, and go on with all other images of train.

    The start is made anew for each subset, byte for byte as `lgp finetune` does. That command keeps the classifier of
    one subset: to go on from it with another subset would use the labels of both.

    Args:
        arm: folder of the arm, with `encoder/`, and with heads for `from_first_fc`.
        data: images and labels.
        subsets: arrays of image ids, all within the training part; a single array for all labels.
        recipe: of both parts.
        session: seed, `run`, resume states and observer. Epoch numbers continue over the trainings.

    Raises:
        LgpError: there are too few unlabelled images, a batch cannot be divided, the disk is full, or a training fails.
        Diverged: a training or its predictions are not finite.
    """
    unlabelled = [_unlabelled(data, ids) for ids in subsets]
    shared = FineTuning.of(arm, data, recipe.supervised, session)
    shared.check_disk(STATE_BYTES_PER_WEIGHT_BYTE * len(subsets))
    results = _Results()
    with joined("semi", shared.device):
        for ids, others in zip(subsets, unlabelled, strict=True):
            _labelled_batch(ids, others, recipe.semi, session)  # before any training
        for number, (ids, others) in enumerate(zip(subsets, unlabelled, strict=True)):
            if rank() == 0:
                said = f"subset {number + 1} of {len(subsets)}, {len(ids)} labels, {len(others)} images without"
                print(f"semi: {arm.name}, {said}", flush=True)
            teacher, progression = _train(shared, recipe, number, ids, others)
            if logits := _finite_predictions(teacher, shared):
                results.add(teacher, logits, progression, recipe)
        if rank() > 0:
            raise WorkerDone
    more = {"unlabelled": float(len(unlabelled[0])), "first_fc": float(shared.first_fc is not None)}
    outcome = results.outcome(len(subsets[0]))
    return replace(outcome, metrics=outcome.metrics | {"base_lr": recipe.base_lr} | more)


def _unlabelled(data: LabelledImages, ids: np.ndarray) -> np.ndarray:
    """Return the images of the training part that are not among `ids`, sorted."""
    return np.setdiff1d(np.concatenate([data.ids("train"), data.ids("unlabeled")]), ids)


def _labelled_batch(ids: np.ndarray, unlabelled: np.ndarray, semi: SemiParams, session: Session) -> int:
    """Return `batch_size`, or the number of labelled images where that is smaller.

    Raises:
        LgpError: the batch cannot be cut into equal parts, one per process and accumulated part, or there are too few
            unlabelled images for a step.
    """
    batch_size, parts = min(semi.batch_size, len(ids)), world_size() * session.params.run.accumulate.get("semi", 1)
    if batch_size % parts:
        raise LgpError(
            f"semi: {batch_size} labelled images a batch cannot be cut into {parts} equal parts (of run.processes and "
            "run.accumulate.semi): lower these"
        )
    needed = batch_size * semi.unlabelled_ratio
    if len(unlabelled) < needed:
        raise LgpError(
            f"semi: {len(unlabelled)} images of train are outside the labelled ones, and a step takes {needed} "
            "(semi.batch_size × semi.unlabelled_ratio): lower these, take fewer labels, or add images without labels"
        )
    return batch_size


def _finite_predictions(teacher: VisionTransformer, shared: FineTuning) -> Logits | None:
    """Return the teacher's logits on val and test in the first process. Raise `Diverged` where one is not finite."""
    logits = predict(teacher, shared) if rank() == 0 else None
    if agree(int(logits is not None and not logits.finite)):
        raise Diverged("semi: the predictions are not finite: lower the learning rate of semi")
    return logits


def _train(
    shared: FineTuning, recipe: Recipe, number: int, ids: np.ndarray, unlabelled: np.ndarray
) -> tuple[VisionTransformer, Progression]:
    """Fine-tune on the images `ids` and go on with the images `unlabelled`; return the teacher and the whole work."""
    session = shared.session
    before = replace(session, observer=OneOfMany(session.observer, number * recipe.semi.epochs))
    start, flops = fit(replace(shared, session=before), Trial(number, number, recipe.base_lr), ids)
    model = SelfTraining(start).to(shared.device)
    progression = _fit(model, shared, recipe, number, ids, unlabelled)
    return model.teacher, replace(progression, train_flops=flops + progression.train_flops)


def _fit(
    model: SelfTraining, shared: FineTuning, recipe: Recipe, number: int, ids: np.ndarray, unlabelled: np.ndarray
) -> Progression:
    """Train student and teacher on the images `ids` and `unlabelled`."""
    session, semi, device = shared.session, recipe.semi, shared.device
    seed, run, name = session.params.seed, session.params.run, f"semi/{number}"
    batch_size = _labelled_batch(ids, unlabelled, semi, session)
    labelled = LabelledCrops(shared.data, recipe.supervised, batch_size, Stream(seed, f"{name}/labelled"), ids)
    crops = SemiCrops(labelled, shared.data, recipe, Stream(seed, name), unlabelled)
    crops.shard(rank(), world_size())
    rate, steps = peak_rate(recipe.rate, batch_size), semi.epochs * crops.steps_per_epoch
    optimizer = adamw(layer_decayed_groups(model.student, rate, semi), BETAS)
    decay = decay_over(semi.teacher_share, steps)  # the published 0.9999 is a share of about 0.05 with 1 % of ImageNet
    optimizer.register_step_post_hook(lambda *_: follow(model.teacher, model.student, decay))

    def after_epoch(_: int) -> Epoch:
        on_val = predict(model.teacher, shared, ("val",))
        return {"train/kept": model.share_kept(), **reliability(on_val, semi.threshold)}

    return Trainer(
        name="semi",
        model=model,
        loss_of=_loss_of(model, crops, shared, recipe, name),
        crops=crops,
        optimizer=optimizer,
        schedule=warmup_cosine(optimizer, steps, whole_warmup_steps(semi.warmup_epochs, crops.steps_per_epoch, steps)),
        epochs=semi.epochs,
        device=device,
        precision=choose_precision(run, device, model.student.embed_dim),
        settings=run,
        store=session.store.part(f"semi{number}"),
        observer=OneOfMany(session.observer, (number + 1) * recipe.supervised.epochs + number * semi.epochs),
        clip_norm=semi.clip_norm,
        after_epoch=after_epoch,
    ).fit()


def _loss_of(
    model: SelfTraining, crops: SemiCrops, shared: FineTuning, recipe: Recipe, name: str
) -> Callable[[Batch], Tensor]:
    """Return the function from a batch to its loss. The training draws from streams that begin with `name`."""
    data, semi, device = shared.data, recipe.semi, shared.device
    ratio, stream = semi.unlabelled_ratio, Stream(shared.session.params.seed, name)

    def strong(images: Tensor, batch: Batch) -> Tensor:
        images = images.float() / 255
        if semi.color_jitter:
            drawn = ColorJitter.draw(batch.size * ratio, 0, semi.strong, stream.generator("colours", batch.step))
            mine = slice(batch.rows.start * ratio, batch.rows.stop * ratio)
            images = color_jitter(images, drawn[mine], semi.strong)
        return data.normalize(images)

    def loss_of(batch: Batch) -> Tensor:
        labelled = data.normalize(batch.crops[:, 0])
        weak, strongly = (half.flatten(0, 1) for half in batch.crops[:, 1:].split(ratio, dim=1))
        labels = crops.labelled.labels(batch).to(device)
        with torch.no_grad():
            confidence, classes = model.teacher(data.normalize(weak)).float().softmax(1).max(1)
            model.count(confidence >= semi.threshold)
        targets = F.one_hot(classes, len(data.classes)).to(confidence.dtype)
        drawn = Mixing.draw(batch.size, semi, data.image_size, stream.generator("mixing", batch.step))
        mixing = drawn.of_rows(batch.rows, ratio).to(device)
        images, targets, confidence = mixed_by_confidence(strong(strongly, batch), targets, confidence, mixing)
        # each process draws its own dropped blocks
        with seeded(stream.seed, f"{name}/step", batch.step, batch.rows.start):
            of_labelled, of_others = model.student(torch.cat([labelled, images])).tensor_split([len(labelled)])
        return semi_supervised_loss(of_labelled, labels, of_others, targets, confidence, recipe)

    return loss_of


def reliability(logits: Logits, threshold: float) -> dict[str, float]:
    """Return how far predictions that the threshold keeps can be relied on, in percent.

    `val/kept` is the share of val that is kept. `val/kept_top1` is the accuracy there; it is left out where none is
    kept. Probabilities are those of the training, not calibrated.
    """
    probabilities, labels = logits.at(1.0).probabilities["val"], logits.labels["val"]
    kept = probabilities.max(1) >= threshold
    right = probabilities.argmax(1) == labels
    return {"val/kept": percent(kept)} | ({"val/kept_top1": percent(right[kept])} if kept.any() else {})


@dataclass
class _Results:
    """What is kept of the trainings on all subsets, in the first process. `kept` is the reliability of each."""

    scored: list[Scored] = field(default_factory=list)
    kept: list[dict[str, float]] = field(default_factory=list)
    flops: int = 0
    classifier: Classifier | None = None

    def add(self, teacher: VisionTransformer, logits: Logits, progression: Progression, recipe: Recipe) -> None:
        """Score the teacher of one more subset. It is kept if it is the best on val so far."""
        temperature = logits.temperature_on_val()
        self.scored.append(logits.scored(temperature))
        of_train = {"train/kept": progression.history[-1]["train/kept"]}
        self.kept.append(of_train | reliability(logits, recipe.semi.threshold))
        self.flops += progression.train_flops
        if best_on_val(self.scored) == len(self.scored) - 1:
            self.classifier = kept_classifier(teacher, recipe.supervised, temperature)

    def outcome(self, labels: int) -> Outcome:
        """Summarise all subsets, of `labels` images each. A reliability is the mean over those that have it."""
        outcome = over_subsets(self.scored, labels, self.classifier)
        names = dict.fromkeys(name for of_subset in self.kept for name in of_subset)
        found = {name: [of_subset[name] for of_subset in self.kept if name in of_subset] for name in names}
        kept = {name: round(float(np.mean(values)), 4) for name, values in found.items()}
        return replace(outcome, metrics=outcome.metrics | kept | {"train/pflop": round(self.flops / 1e15, 9)})
