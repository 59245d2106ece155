"""Semi-supervised fine-tuning: its formulas against slow ones, what arrives in it, and that it resumes to the bit."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from arrivals import Arrivals, Coloured, Slow, arriving, jittered, same
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from lgp.compute.randomness import Stream
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch
from lgp.data.views import ColorJitter
from lgp.errors import Diverged, LgpError
from lgp.evaluate import semi_supervised as module
from lgp.evaluate.fine_tuning import LabelledCrops, finetune, fit
from lgp.evaluate.outcome import Logits, Outcome
from lgp.evaluate.semi_supervised import (
    Mixing,
    Recipe,
    SemiCrops,
    chosen_rate,
    mixed_by_confidence,
    reliability,
    semi_supervise,
    semi_supervised_loss,
)
from lgp.models.averaging import decay_over
from lgp.models.files import encoder_digest
from lgp.params.evaluate import FineTuneParams, SemiParams
from lgp.params.pretrain import ViewParams
from lgp.pretrain.arm import Session
from lgp.training.loop import Trainer
from lgp.training.resume_states import StateStore

SUPERVISED = {
    "epochs": 3, "batch_size": 12, "base_lr": [0.3, 0.5], "warmup_epochs": 1, "weight_decay": 0.06, "layer_decay": 0.6,
    "drop_path": 0, "label_smoothing": 0.1, "crop_scale_min": 0.4, "flip_p": 0.5,
}  # fmt: skip
SEMI = {
    "epochs": 2, "batch_size": 4, "base_lr": 0.9, "warmup_epochs": 1, "weight_decay": 0.03, "layer_decay": 0.5,
    "unlabelled_ratio": 3, "threshold": 0.372, "weight": 2.5, "teacher_share": 0.5, "mixing": "none",
    "rand_augment": None,
}  # fmt: skip
EPOCH = 3  # steps: 36 unlabelled images are three batches of 12
VIEWS = ViewParams(crop_scale_min=0.4, flip_p=0.5)


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def log_epoch(self, values: dict[str, float]) -> None:
        self.epochs.append(values)


def recipe_of(supervised: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    of_labels = FineTuneParams.model_validate(SUPERVISED | (supervised or {}))
    return Recipe(of_labels, 0.5, SemiParams.model_validate(SEMI | changes))


def session_in(coloured: Coloured, folder: Path, run: dict[str, Any] | None = None, observer: Any = None) -> Session:
    params = coloured.params({"run": run or {}})
    return Session(coloured.data, params, StateStore(folder, "code"), observer or Recorder())


def trained(
    coloured: Coloured,
    folder: Path,
    subsets: int = 1,
    run: dict[str, Any] | None = None,
    observer: Any = None,
    supervised: dict[str, Any] | None = None,
    **changes: Any,
) -> Outcome:
    ids, session = coloured.data.subsets("4shot")[:subsets], session_in(coloured, folder, run, observer)
    return semi_supervise(coloured.mim.parent, coloured.data, ids, recipe_of(supervised, **changes), session)


def recorded(coloured: Coloured, folder: Path, **changes: Any) -> tuple[list[Arrivals], Outcome]:
    """Train on one subset; return what arrived in fine-tuning and in what goes on from it."""
    with arriving() as trainings, unheard_starts():
        outcome = trained(coloured, folder, **changes)
    return trainings, outcome


@contextmanager
def unheard_starts() -> Iterator[None]:
    """Stop listening to a fine-tuned model, which is copied."""

    def unheard(*about: Any) -> tuple[nn.Module, int]:
        start, flops = fit(*about)
        for part in start.modules():
            part._forward_hooks.clear()
        return start, flops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "fit", unheard)
        yield


@pytest.fixture(scope="module")
def plain(coloured: Coloured, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Arrivals], Outcome]:
    """A training without mixing and without augmentation but crops and flips."""
    return recorded(coloured, tmp_path_factory.mktemp("plain"))


def others_of(coloured: Coloured, number: int = 0) -> np.ndarray:
    """Return the training images outside a subset, found by the names of parts."""
    subset = set(coloured.data.subsets("4shot")[number].tolist())
    return np.array([i for i, part in enumerate(coloured.data.index["part"]) if part == "train" and i not in subset])


def unlabelled_batches(coloured: Coloured) -> Slow:
    stream = Stream(coloured.values["seed"], "semi/0")
    return Slow(coloured.data, others_of(coloured), VIEWS, 2, 12, stream, InterpolationMode.BICUBIC)


def labelled_batches(coloured: Coloured) -> Slow:
    ids, stream = coloured.data.subsets("4shot")[0], Stream(coloured.values["seed"], "semi/0/labelled")
    return Slow(coloured.data, ids, VIEWS, 1, 4, stream, InterpolationMode.BICUBIC)


# formulas


def mixed_slowly(
    images: Tensor, targets: Tensor, confidence: Tensor, mixing: Mixing
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Mix pair by pair and pixel by pixel."""
    size, found = images.shape[-1], []
    for i, j in enumerate(mixing.partner.tolist()):
        share = float(confidence[i]) / (float(confidence[i]) + float(confidence[j]))
        image = images[i].clone()
        if mixing.cut[i]:
            side, pasted = int(size * math.sqrt(1 - share)), 0
            row, column = mixing.centre[i].tolist()
            for y in range(size):
                for x in range(size):
                    across, down = x - column + side // 2, y - row + side // 2
                    if 0 <= across < side and 0 <= down < side:
                        image[:, y, x] = images[j, :, y, x]
                        pasted += 1
            share = 1 - pasted / size**2
        else:
            image = share * images[i] + (1 - share) * images[j]
        target = share * targets[i] + (1 - share) * targets[j]
        found.append((image, target, max(float(confidence[i]), float(confidence[j]))))
    return tuple(map(list, zip(*found, strict=True)))  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["both", "mixup", "cutmix", "none"])
def test_pairs_are_mixed_as_in_a_slow_loop(how: str) -> None:
    rng = torch.Generator().manual_seed(3)
    images = torch.rand(20, 3, 7, 7, generator=rng, dtype=torch.float64)
    targets = F.one_hot(torch.randint(4, (20,), generator=rng), 4).double()
    confidence = 0.25 + 0.75 * torch.rand(20, generator=rng, dtype=torch.float64)
    mixing = Mixing.draw(5, recipe_of(mixing=how, unlabelled_ratio=4).semi, 7, rng)
    found = mixed_by_confidence(images, targets, confidence, mixing)
    for ours, slow in zip(found, mixed_slowly(images, targets, confidence, mixing), strict=True):
        expected = torch.stack([torch.as_tensor(one, dtype=torch.float64) for one in slow])
        assert torch.allclose(ours, expected, atol=1e-12)
    changed = (found[0] != images).flatten(1).any(1)
    assert changed.all() if how == "mixup" else changed.any() == (how != "none")


def test_boxes_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = torch.tensor([0.1, 0.3, 0.5, 0.62, 0.75, 0.97], dtype=torch.float64)
    centre = torch.tensor([[0, 0], [3, 4], [6, 6], [2, 6], [5, 1], [3, 3]])
    boxes = module._boxes(shares, centre, 7)
    for share, place, box in zip(shares.tolist(), centre.tolist(), boxes, strict=True):
        left = iter(place)
        monkeypatch.setattr(np.random, "randint", lambda *_, drawn=left, **__: next(drawn))
        (top, bottom, first, last), corrected = cutmix_bbox_and_lam((3, 7, 7), share)
        expected = torch.zeros(7, 7, dtype=torch.bool)
        expected[top:bottom, first:last] = True
        assert torch.equal(box, expected)
        assert 1 - box.double().mean().item() == pytest.approx(corrected)


def test_partner_is_another_image_of_the_same_row_and_each_is_one_once() -> None:
    mixing = Mixing.draw(6, recipe_of(mixing="both", unlabelled_ratio=5).semi, 8, torch.Generator().manual_seed(0))
    partner = mixing.partner.tolist()
    assert sorted(partner) == list(range(30))
    assert all(i != j and i // 5 == j // 5 for i, j in enumerate(partner))
    assert 5 < mixing.cut.sum() < 25
    part = mixing.of_rows(slice(2, 4), 5)
    assert (part.partner + 10).tolist() == partner[10:20]
    assert torch.equal(part.cut, mixing.cut[10:20])
    assert torch.equal(part.centre, mixing.centre[10:20])


def loss_slowly(
    labelled: Tensor, labels: list[int], others: Tensor, targets: Tensor, confidence: Tensor, recipe: Recipe
) -> float:
    """Sum over images and classes, one by one."""
    smoothing, classes = recipe.supervised.label_smoothing, labelled.shape[1]

    def entropy(logits: Tensor, target: list[float]) -> float:
        total = math.log(sum(math.exp(value) for value in logits.tolist()))
        soft = [(1 - smoothing) * share + smoothing / classes for share in target]
        return -sum(share * (value - total) for share, value in zip(soft, logits.tolist(), strict=True))

    supervised = [
        entropy(logits, [float(c == label) for c in range(classes)])
        for logits, label in zip(labelled, labels, strict=True)
    ]
    unsupervised = [
        entropy(logits, target.tolist()) if sure >= recipe.semi.threshold else 0.0
        for logits, target, sure in zip(others, targets, confidence.tolist(), strict=True)
    ]
    return sum(supervised) / len(supervised) + recipe.semi.weight * sum(unsupervised) / len(unsupervised)


@pytest.mark.parametrize("changes", [{}, {"threshold": 0.8}, {"threshold": 0}, {"weight": 0.1}], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_that_of_a_slow_loop(smoothing: float, changes: dict[str, Any]) -> None:
    recipe, rng = recipe_of({"label_smoothing": smoothing}, **changes), torch.Generator().manual_seed(1)
    labelled, others = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (4, 12))
    labels = torch.randint(5, (4,), generator=rng)
    targets = torch.rand(12, 5, generator=rng, dtype=torch.float64).softmax(1)
    confidence = torch.rand(12, generator=rng, dtype=torch.float64)
    confidence[0] = recipe.semi.threshold  # is kept
    loss = semi_supervised_loss(labelled, labels, others, targets, confidence, recipe)
    expected = loss_slowly(labelled, labels.tolist(), others, targets, confidence, recipe)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_teacher_averages_over_its_share_of_the_steps() -> None:
    assert decay_over(0.1, 1000) == pytest.approx(0.99)
    assert decay_over(0.05, 200_000) == pytest.approx(0.9999)
    assert decay_over(0.1, 3) == 0
    assert decay_over(0.1, 15) == pytest.approx(1 / 3)


def test_reliability_is_share_and_accuracy_of_what_the_threshold_keeps() -> None:
    sure = np.log(np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.45, 0.55]]))
    logits = Logits({"val": sure}, {"val": np.array([0, 1, 1, 0])}, {"val": np.arange(4)})
    assert reliability(logits, 0.6) == {"val/kept": 75.0, "val/kept_top1": pytest.approx(66.6667)}
    assert reliability(logits, 0.5) == {"val/kept": 100.0, "val/kept_top1": 50.0}
    assert reliability(logits, 0.95) == {"val/kept": 0.0}


# what arrives


def test_start_is_the_model_of_fine_tuning_and_teacher_and_student_are_equal(
    plain: tuple[list[Arrivals], Outcome], coloured: Coloured, tmp_path: Path
) -> None:
    ids, supervised = coloured.data.subsets("4shot")[:1], recipe_of({"base_lr": 0.5}).supervised
    tuned = finetune(coloured.mim.parent, coloured.data, ids, supervised, session_in(coloured, tmp_path))
    assert tuned.classifier is not None
    assert tuned.classifier.model is not None
    start, temperature = plain[0][1].start, tuned.classifier.temperature
    for name, tensor in tuned.classifier.model.items():
        given = start[f"student.{name}"] / (temperature if name.startswith("head") else 1)
        assert torch.equal(given, tensor), name
        assert torch.equal(start[f"teacher.{name}"], start[f"student.{name}"])
    assert plain[1].metrics["base_lr"] == 0.5


def test_teacher_sees_weak_views_of_the_unlabelled_images(
    plain: tuple[list[Arrivals], Outcome], coloured: Coloured
) -> None:
    arrivals, batches = plain[0][1], unlabelled_batches(coloured)
    assert len(arrivals.steps) == 2 * EPOCH
    for step in (0, 1, 2 * EPOCH - 1):
        images = arrivals.steps[step].inputs["teacher.patch_embed"][0]  # at the end of an epoch those of val follow
        assert same(images, batches.normalized(batches.crops(step, 0)))


def test_student_sees_labelled_images_and_other_views_of_the_same_unlabelled_ones(
    plain: tuple[list[Arrivals], Outcome], coloured: Coloured
) -> None:
    arrivals, labelled, others = plain[0][1], labelled_batches(coloured), unlabelled_batches(coloured)
    for step in (0, 1, 2 * EPOCH - 1):
        (images,) = arrivals.steps[step].inputs["student.patch_embed"]
        assert same(images[:4], labelled.normalized(labelled.crops(step, 0)))
        assert same(images[4:], others.normalized(others.crops(step, 1)))


def test_colours_of_the_students_view_are_drawn_for_each_unlabelled_image(coloured: Coloured, tmp_path: Path) -> None:
    (_, arrivals), _ = recorded(coloured, tmp_path, color_jitter=0.5)
    batches, views = unlabelled_batches(coloured), recipe_of(color_jitter=0.5).semi.strong
    assert (views.brightness, views.contrast, views.saturation, views.hue, views.jitter_p) == (0.5, 0.5, 0.5, 0, 1)
    drawn = ColorJitter.draw(12, 0, views, batches.stream.generator("colours", 1))
    expected = torch.stack([jittered(crop, drawn, row) for row, crop in enumerate(batches.crops(1, 1))])
    found = arrivals.steps[1].inputs["student.patch_embed"][0][4:]
    assert same(found, batches.normalized(expected), levels=2)
    assert not same(found, batches.normalized(batches.crops(1, 1)))
    (weak,) = arrivals.steps[1].inputs["teacher.patch_embed"]
    assert same(weak, batches.normalized(batches.crops(1, 0)))


def test_rand_augment_is_of_the_students_view_alone(coloured: Coloured, tmp_path: Path) -> None:
    (_, arrivals), _ = recorded(coloured, tmp_path, rand_augment="rand-m9-n3")
    labelled, others = labelled_batches(coloured), unlabelled_batches(coloured)
    (images,) = arrivals.steps[2].inputs["student.patch_embed"]
    assert same(images[:4], labelled.normalized(labelled.crops(2, 0)))
    changed = [
        not same(a[None], b[None]) for a, b in zip(images[4:], others.normalized(others.crops(2, 1)), strict=True)
    ]
    assert sum(changed) > 6
    assert same(arrivals.steps[2].inputs["teacher.patch_embed"][0], others.normalized(others.crops(2, 0)))


@pytest.mark.parametrize("changes", [{}, {"threshold": 0.99}, {"weight": 0.3}, {"mixing": "both"}], ids=str)
def test_loss_of_a_step_is_made_of_labels_and_what_the_teacher_says(
    changes: dict[str, Any], coloured: Coloured, tmp_path: Path
) -> None:
    (_, arrivals), _ = recorded(coloured, tmp_path, **changes)
    recipe, labelled, others = recipe_of(**changes), labelled_batches(coloured), unlabelled_batches(coloured)
    shares = []
    for number, step in enumerate(arrivals.steps):
        confidence, classes = step.outputs["teacher"][0].double().softmax(1).max(1)
        shares.append((confidence >= recipe.semi.threshold).double().mean().item())
        mixing = Mixing.draw(4, recipe.semi, 8, others.stream.generator("mixing", number))
        views = others.normalized(others.crops(number, 1)).double()
        images, targets, sure = mixed_slowly(views, F.one_hot(classes, 3).double(), confidence, mixing)
        assert same(step.inputs["student.patch_embed"][0][4:], torch.stack(images).float())
        logits = step.outputs["student"][0].double()
        labels = coloured.data.labels[labelled.ids_of(number)].tolist()
        of_others = torch.stack(targets), torch.tensor(sure)
        assert step.loss == pytest.approx(loss_slowly(logits[:4], labels, logits[4:], *of_others, recipe), abs=1e-5)
    if not changes:
        assert 0 < np.mean(shares) < 1
    by_epoch = [values["train/kept"] for values in arrivals.trainer.now.history]
    assert by_epoch == pytest.approx([100 * np.mean(shares[:EPOCH]), 100 * np.mean(shares[EPOCH:])])


def test_unlabelled_are_the_training_images_outside_the_subset(coloured: Coloured, tmp_path: Path) -> None:
    with arriving() as trainings, unheard_starts():
        trained(coloured, tmp_path, subsets=2, epochs=1, warmup_epochs=0)
    for number, arrivals in enumerate(trainings[1::2]):
        crops = arrivals.trainer.crops
        assert isinstance(crops, SemiCrops)
        seen = np.concatenate([crops.ids_of(step) for step in range(EPOCH)])
        assert sorted(seen) == others_of(coloured, number).tolist()
        assert set(coloured.data.index["part"][seen]) == {"train"}
        subset = coloured.data.subsets("4shot")[number].tolist()
        assert sorted(np.concatenate([crops.labelled.ids_of(step) for step in range(EPOCH)])) == subset


def test_teacher_follows_the_student_after_each_step_as_in_a_slow_loop(
    plain: tuple[list[Arrivals], Outcome],
) -> None:
    arrivals, decay = plain[0][1], 1 - 1 / (0.5 * 2 * EPOCH)
    after = [step.weights for step in arrivals.steps[1:]] + [arrivals.model.state_dict()]
    names = [name.removeprefix("student.") for name in arrivals.start if name.startswith("student.")]
    for name in names:
        teacher = arrivals.start[f"teacher.{name}"].double()
        for weights in after:
            teacher = decay * teacher + (1 - decay) * weights[f"student.{name}"].double()
            assert torch.allclose(weights[f"teacher.{name}"].double(), teacher, atol=1e-6), name
    assert any(not torch.equal(after[-1][f"teacher.{name}"], after[-1][f"student.{name}"]) for name in names)


def test_optimizer_has_the_student_alone_at_rates_by_layer(plain: tuple[list[Arrivals], Outcome]) -> None:
    arrivals, peak = plain[0][1], 0.9 * 4 / 256
    rates, decays = arrivals.steps[EPOCH].rates, arrivals.grouped("weight_decay")  # just after the warm-up
    assert rates.keys() == {name for name in arrivals.names.values() if name.startswith("student.")}
    assert rates["student.head.weight"] == pytest.approx(peak)
    assert rates["student.blocks.0.attn.qkv.weight"] == pytest.approx(peak * 0.5**3)
    assert decays["student.head.weight"] == 0.03
    assert arrivals.steps[0].rates["student.head.weight"] == 0
    assert not any(p.requires_grad for p in arrivals.model.teacher.parameters())
    assert all(step.training for step in arrivals.steps)
    assert not arrivals.model.teacher.training


def test_dropped_blocks_are_the_students_alone(coloured: Coloured, tmp_path: Path) -> None:
    (_, arrivals), _ = recorded(coloured, tmp_path, supervised={"drop_path": 0.9})
    step = arrivals.steps[0]
    teacher = arrivals.model.teacher
    teacher.load_state_dict({n.removeprefix("teacher."): w for n, w in step.weights.items() if n.startswith("teacher")})
    with torch.no_grad():
        assert torch.allclose(teacher(*step.inputs["teacher"]), step.outputs["teacher"][0], atol=1e-6)
    assert arrivals.model.student.blocks[-1].drop_path1.drop_prob == pytest.approx(0.9)


def test_teacher_is_published_and_scored(plain: tuple[list[Arrivals], Outcome], coloured: Coloured) -> None:
    (_, arrivals), outcome = plain
    kept = outcome.classifier
    assert kept is not None
    assert kept.model is not None
    teacher = arrivals.model.teacher.state_dict()
    for name, tensor in kept.model.items():
        assert torch.equal(tensor, teacher[name] / (kept.temperature if name.startswith("head") else 1)), name
    ids = coloured.data.ids("test")
    with torch.no_grad():
        logits = arrivals.model.teacher(coloured.data.normalize(coloured.data.whole(ids, "bicubic")))
    confidence = (logits / kept.temperature).softmax(1).max(1)[0].numpy()
    assert outcome.predictions["id"].tolist() == ids.tolist()
    assert np.allclose(outcome.predictions["confidence"], confidence, atol=1e-5)
    val = coloured.data.ids("val")
    with torch.no_grad():
        sure = arrivals.model.teacher(coloured.data.normalize(coloured.data.whole(val, "bicubic"))).softmax(1).max(1)[0]
    assert outcome.metrics["val/kept"] == pytest.approx(100 * (sure >= 0.372).double().mean().item(), abs=1e-3)
    last = arrivals.trainer.now.history[-1]
    assert outcome.metrics["train/kept"] == pytest.approx(last["train/kept"], abs=1e-3)
    assert outcome.metrics["val/kept"] == pytest.approx(last["val/kept"], abs=1e-3)
    assert (outcome.metrics["labels"], outcome.metrics["unlabelled"]) == (12, 36)


def shuffled(data: LabelledImages, ids: np.ndarray) -> np.ndarray:
    labels = data.labels.copy()
    labels[ids] = np.random.default_rng(0).permutation(labels[ids])
    return labels


@pytest.mark.parametrize("part", ["test", "unlabelled"])
def test_shuffled_labels_that_may_not_be_read_change_no_prediction(
    part: str,
    plain: tuple[list[Arrivals], Outcome],
    coloured: Coloured,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = coloured.data.ids("test") if part == "test" else others_of(coloured)
    monkeypatch.setattr(coloured.data, "labels", shuffled(coloured.data, ids))
    outcome = trained(coloured, tmp_path)
    for column in ("prediction", "confidence"):
        assert outcome.predictions[column].tolist() == plain[1].predictions[column].tolist()
    assert outcome.metrics["val/top1"] == plain[1].metrics["val/top1"]


# resuming, parts and processes


def stopping(monkeypatch: pytest.MonkeyPatch, store: str, at: int) -> Callable[[], None]:
    """Let the training of a store end by Ctrl-C after a step; return what lets it go on."""
    step = Trainer._step

    def interrupted(trainer: Trainer, *rest: Any) -> None:
        step(trainer, *rest)
        if trainer.store.folder.name == store and trainer.now.step == at:
            trainer._check_losses()
            trainer._save()
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", interrupted)
    return lambda: monkeypatch.setattr(Trainer, "_step", step)


@pytest.mark.parametrize(("store", "at"), [("semi1", 4), ("semi0", 2), ("training1", 1)])
def test_interrupted_goes_on_to_the_bit(
    store: str, at: int, coloured: Coloured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {
        "subsets": 2, "mixing": "both", "rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3,
        "supervised": {"drop_path": 0.2, "batch_size": 6},
    }  # fmt: skip
    told, told_again = Recorder(), Recorder()
    whole = trained(coloured, tmp_path / "a", observer=told, **settings)
    go_on = stopping(monkeypatch, store, at)
    with pytest.raises(KeyboardInterrupt):
        trained(coloured, tmp_path / "b", **settings)
    go_on()
    torch.manual_seed(9)
    resumed = trained(coloured, tmp_path / "b", observer=told_again, **settings)
    assert resumed.metrics == whole.metrics
    assert resumed.predictions.equals(whole.predictions)
    assert told_again.epochs == told.epochs
    assert [values["epoch"] for values in told.epochs] == list(range(1, 11))
    assert whole.classifier is not None
    assert resumed.classifier is not None
    weights, again = whole.classifier.model, resumed.classifier.model
    assert weights is not None
    assert again is not None
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_accumulated_parts_train_to_the_same(coloured: Coloured, tmp_path: Path) -> None:
    settings = {"mixing": "both", "color_jitter": 0.3}
    one = trained(coloured, tmp_path / "1", **settings)
    two = trained(coloured, tmp_path / "2", run={"accumulate": {"semi": 2}}, **settings)
    assert np.allclose(one.predictions["confidence"], two.predictions["confidence"], rtol=1e-4)
    assert one.metrics["train/kept"] == pytest.approx(two.metrics["train/kept"])


def test_each_process_reads_its_rows_of_every_batch(coloured: Coloured) -> None:
    recipe, ids = recipe_of(rand_augment="rand-m9-n2"), coloured.data.subsets("4shot")[0]
    whole, part = (
        SemiCrops(
            LabelledCrops(coloured.data, recipe.supervised, 4, Stream(0, "l"), ids),
            coloured.data, recipe, Stream(0, "s"), others_of(coloured),
        )
        for _ in range(2)
    )  # fmt: skip
    part.shard(1, 2)
    assert whole[1].shape == (4, 1 + 2 * 3, 3, 8, 8)
    assert torch.equal(whole[1][2:], part[1])
    assert whole.row_bytes == whole[1][0].numel()
    assert torch.equal(torch.cat([whole.read(1, rows) for rows in whole.parts(2 * whole.row_bytes)]), whole[1])
    batch = part.batch(1, part[1])
    assert (batch.rows, batch.size) == (slice(2, 4), 4)
    labels = whole.labelled.labels(Batch.whole(whole[1], 1))
    assert part.labelled.labels(batch).tolist() == labels[2:].tolist()


def test_trainer_gets_the_rows_of_its_process_and_the_limit_of_gradients(
    coloured: Coloured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def noted(**about: Any) -> None:
        given.update(about)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "Trainer", noted)
    with pytest.raises(KeyboardInterrupt):
        trained(coloured, tmp_path, clip_norm=0.7)
    assert (given["name"], given["clip_norm"], given["epochs"]) == ("semi", 0.7, 2)
    assert given["crops"].rows == given["crops"].labelled.rows == slice(2, 4)


# what is refused


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fit", lambda *_: pytest.fail("it trains"))


@pytest.mark.usefixtures("no_training")
def test_too_few_unlabelled_images_are_refused_before_any_training(coloured: Coloured, tmp_path: Path) -> None:
    with pytest.raises(LgpError, match=r"36 images of train are outside the labelled ones, and a step takes 40"):
        trained(coloured, tmp_path, unlabelled_ratio=10)
    with pytest.raises(LgpError, match=r"9 images of train .*, and a step takes 12 .*lower these, take fewer labels"):
        semi_supervise(
            coloured.mim.parent,
            coloured.data,
            coloured.data.labelled("all"),
            recipe_of(),
            session_in(coloured, tmp_path),
        )


@pytest.mark.usefixtures("no_training")
def test_batch_that_cannot_be_cut_is_refused_before_any_training(coloured: Coloured, tmp_path: Path) -> None:
    with pytest.raises(LgpError, match=r"semi: 4 labelled images a batch cannot be cut into 3 equal parts"):
        trained(coloured, tmp_path, run={"accumulate": {"semi": 3}})


def test_training_that_diverges_says_so(coloured: Coloured, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="lower the learning rate of semi"):
        trained(coloured, tmp_path, base_lr=1e30)


def test_rate_is_the_given_one_or_that_of_fine_tuning() -> None:
    assert recipe_of().rate == 0.9
    assert recipe_of(base_lr=None).rate == 0.5


def test_rate_is_that_of_fine_tuning_of_the_same_encoder_and_recipe(coloured: Coloured) -> None:
    metrics, recipe = {"encoder": encoder_digest(coloured.mim), "base_lr": 0.3}, recipe_of().supervised
    assert chosen_rate(metrics, "cl", "4shot", coloured.mim, recipe) == 0.3
    with pytest.raises(LgpError, match=r"before its encoder was trained anew: run `lgp finetune cl 4shot` again"):
        chosen_rate(metrics | {"encoder": "other"}, "cl", "4shot", coloured.mim, recipe)
    with pytest.raises(LgpError, match=r"at the rate 0\.7, which is not among finetune\.4shot\.base_lr \[0\.3, 0\.5\]"):
        chosen_rate(metrics | {"base_lr": 0.7}, "cl", "4shot", coloured.mim, recipe)
