"""What a fine-tuning is built from: weights, batches, loss, rates, and what is asked, said and counted around it.

Nothing is trained.
"""

import functools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import Silent, merged
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from lgp.compute.launch import WorkerDone
from lgp.compute.randomness import Stream, seeded
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.errors import Diverged, LgpError
from lgp.evaluate import fine_tuning as module
from lgp.evaluate.fine_tuning import (
    FineTuning,
    LabelledCrops,
    OneOfMany,
    RandAugmentation,
    Trial,
    batch_size_for,
    build_classifier,
    finetune,
    fit,
    layer_decayed_groups,
    predict,
)
from lgp.evaluate.outcome import Logits, Outcome, over_subsets
from lgp.features.extraction import Running
from lgp.models.encoder_folder import load_encoder
from lgp.models.heads_file import save_heads
from lgp.params.evaluate import FineTuneParams
from lgp.params.file import Params
from lgp.pretrain.arm import Session
from lgp.training.loop import Progression
from lgp.training.optimizer import warmup_cosine
from lgp.training.resume_states import StateStore

CPU = torch.device("cpu")
PLAIN = {"drop_path": 0, "label_smoothing": 0.2, "rand_augment": None, "random_erasing": 0, "mixup": 0, "cutmix": 0}


@pytest.fixture
def params(values: dict[str, Any]) -> Params:
    return Params.model_validate(merged(values, {"seed": 6, "run": {"decoded_gib": 0.5}}))


@pytest.fixture
def session(params: Params, prepared: LabelledImages, tmp_path: Path) -> Session:
    return Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())


def recipe_of(params: Params, **changes: Any) -> FineTuneParams:
    given = {**PLAIN, "epochs": 6, "warmup_epochs": 1, "batch_size": 20, "weight_decay": 0.06, "layer_decay": 0.5}
    return FineTuneParams.model_validate(params.finetune["10pct"].model_dump() | given | changes)


class Fixed:
    """A trainer that does no step, and keeps what it was given."""

    made: list["Fixed"]

    def __init__(self, **given: Any) -> None:
        self.given = SimpleNamespace(**given)
        self.made.append(self)

    def fit(self) -> Progression:
        return Progression(train_flops=123)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Fixed]:
    Fixed.made = []
    monkeypatch.setattr(module, "Trainer", Fixed)
    return Fixed.made


# one training

TRIAL = Trial(5, 2, 0.4)  # the sixth training, on the third subset, at 0.4 per 256 images


def shared_of(folder: Path, session: Session, recipe: FineTuneParams, first_fc: Tensor | None = None) -> FineTuning:
    return FineTuning(folder.parent, session.data, recipe, session, CPU, first_fc)  # type: ignore[arg-type]


def test_training_gets_what_recipe_and_trial_say(trainers: list[Fixed], session: Session, encoder_folder: Path) -> None:
    recipe, ids = recipe_of(session.params, clip_norm=0.7), session.data.ids("train")[:70]
    model, flops = fit(shared_of(encoder_folder, session, recipe), TRIAL, ids)
    given = trainers[0].given
    assert flops == 123
    assert (given.name, given.model, given.settings) == ("finetune", model, session.params.run)
    assert (given.epochs, given.device, given.precision, given.clip_norm) == (6, CPU, torch.float32, 0.7)
    assert given.store.folder == session.store.folder / "training5"
    assert given.observer == OneOfMany(session.observer, 5 * 6)
    with seeded(6, "finetune/2/init"):
        expected = build_classifier(encoder_folder, 10, recipe).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    crops = LabelledCrops(session.data, recipe, 20, Stream(6, "finetune/2"), ids)
    assert torch.equal(given.crops[2], crops[2])
    assert given.crops.ids.tolist() == ids.tolist()
    groups = layer_decayed_groups(model, 0.4 * 20 / 256, recipe)
    assert [(g["initial_lr"], g["weight_decay"], g["betas"]) for g in given.optimizer.param_groups] == [
        (g["lr"], g["weight_decay"], (0.9, 0.999)) for g in groups
    ]
    schedule = warmup_cosine(given.optimizer, 6 * 3, 3)  # three batches of 20 of 70 images, one epoch of warm-up
    for step in (0, 2, 3, 10, 17):
        assert given.schedule._get_lr(step) == schedule._get_lr(step)


def test_first_layer_of_the_projector_reaches_the_classifier(
    trainers: list[Fixed], session: Session, encoder_folder: Path
) -> None:
    first_fc = torch.randn(32, 16)
    shared = shared_of(encoder_folder, session, recipe_of(session.params, from_first_fc=True), first_fc)
    model, _ = fit(shared, TRIAL, session.data.ids("train")[:70])
    assert torch.equal(model.head[0].weight, first_fc)  # type: ignore[index,union-attr]
    assert 1e-5 < model.head[1].weight.std() < 3e-5  # type: ignore[index,union-attr,operator]


def test_processes_and_parts_share_a_batch(
    trainers: list[Fixed], session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    ids = session.data.ids("train")[:70]
    fit(shared_of(encoder_folder, session, recipe_of(session.params)), TRIAL, ids)
    assert trainers[0].given.crops.rows == slice(10, 20)
    monkeypatch.undo()
    monkeypatch.setattr(module, "Trainer", Fixed)
    fit(shared_of(encoder_folder, session, recipe_of(session.params)), TRIAL, ids[:15])
    assert trainers[1].given.crops.batch_size == 15  # one process and one part take any number
    monkeypatch.setattr(module, "world_size", lambda: 2)
    run = session.params.run.model_copy(update={"accumulate": {"finetune": 3}})
    parted = replace(session, params=session.params.model_copy(update={"run": run}))
    with pytest.raises(LgpError, match="20 labelled images a batch cannot be cut into 6 equal parts"):
        fit(shared_of(encoder_folder, parted, recipe_of(session.params)), TRIAL, ids)


def test_precision_and_place_are_asked_for_with_the_models_width(
    trainers: list[Fixed], session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "choose_precision", lambda *about: asked.append(about) or torch.bfloat16)
    monkeypatch.setattr(module, "place", lambda *about: asked.append(about))
    model, _ = fit(shared_of(encoder_folder, session, recipe_of(session.params)), TRIAL, session.data.ids("train"))
    assert asked == [(session.params.run, CPU, 16), (model, CPU, torch.bfloat16)]
    assert trainers[0].given.precision == torch.bfloat16


ROWS, STEP = slice(4, 10), 4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"random_erasing": 1.0},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5, "drop_path": 0.3},
    ],
)
def test_loss_is_of_the_rows_augmented_as_the_step_says(
    changes: dict[str, Any], trainers: list[Fixed], session: Session, encoder_folder: Path
) -> None:
    data, recipe = session.data, recipe_of(session.params, **changes)
    model, _ = fit(shared_of(encoder_folder, session, recipe), TRIAL, data.ids("train")[:70])
    nn.init.normal_(model.get_parameter("head.weight"))  # from near zero every loss is the same
    given = trainers[0].given
    batch = Batch(given.crops[STEP][ROWS], STEP, ROWS, 20)
    images = data.normalize(batch.crops[:, 0])
    labels = torch.from_numpy(data.labels[given.crops.ids_of(STEP)[ROWS]])
    with seeded(6, "finetune/2/step", STEP, ROWS.start):
        if recipe.random_erasing:
            images = RandomErasing(recipe.random_erasing, mode="pixel", device="cpu")(images)
        if recipe.mixup or recipe.cutmix:
            images, soft = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.2, num_classes=10)(images, labels)
        else:
            soft = F.one_hot(labels, 10) * 0.8 + 0.02
        expected = -(model(images).log_softmax(1) * soft).sum(1).mean()
    assert given.loss_of(batch).item() == pytest.approx(expected.item(), rel=1e-5)


# images


def colour_crops(data: LabelledImages, params: Params, **changes: Any) -> LabelledCrops:
    recipe = recipe_of(params, rand_augment="rand-m9-mstd0.5-inc1", crop_scale_min=0.5, **changes)
    return LabelledCrops(data, recipe, 8, Stream(0, "f"), data.ids("train")[:20])


def test_rand_augment_knows_mean_colour_shift_and_interpolation(prepared: LabelledImages, params: Params) -> None:
    augment = colour_crops(prepared, params).augment
    assert augment is not None
    grey, size = round(255 * prepared.mean[0]), prepared.image_size
    for operation in augment.augment.ops:
        assert operation.hparams["img_mean"] == (grey, grey, grey)
        assert operation.hparams["translate_const"] == round(0.45 * size)
        assert operation.hparams["interpolation"] == Image.Resampling.BICUBIC


def test_every_crop_is_augmented_by_its_own_draw_in_the_images_mode(prepared: LabelledImages, params: Params) -> None:
    crops = colour_crops(prepared, params)
    plain = CropDataset(prepared, recipe_of(params, crop_scale_min=0.5).views, 1, 8, Stream(0, "f"), crops.ids)
    assert crops.augment is not None
    for row, crop in enumerate(plain[1][:, 0]):
        with Stream(0, "f").seeded("rand_augment", 1, row):
            expected = crops.augment.augment(Image.fromarray(crop[0].numpy()).convert("RGB")).convert("L")
        assert np.array_equal(crops[1][row, 0, 0].numpy(), np.array(expected))


def test_other_processes_augment_their_rows_as_one_process_does(prepared: LabelledImages, params: Params) -> None:
    whole, half = colour_crops(prepared, params), colour_crops(prepared, params)
    half.shard(1, 2)
    assert torch.equal(half[1], whole[1][4:])
    assert half.labels(Batch(half[1], 1, half.rows, 8)).tolist() == prepared.labels[whole.ids_of(1)[4:]].tolist()


def test_mean_colour_of_colour_images_has_their_three_channels(params: Params) -> None:
    data = SimpleNamespace(mean=(0.1, 0.2, 0.3), image_size=20, channels=3)
    described = RandAugmentation.of("rand-m9-mstd0.5-inc1", recipe_of(params), data)  # type: ignore[arg-type]
    assert described is not None
    augment = described.augment
    assert augment.ops[0].hparams["img_mean"] == (26, 51, 76)
    assert augment.ops[0].hparams["translate_const"] == 9


def test_bits_are_of_the_level_and_the_parameters() -> None:
    def bits_of(level: float, hparams: dict[str, int]) -> tuple[int]:
        return (int(level) + hparams["more"],)

    assert [module._one_bit_or_more(bits_of, level, {"more": -2}) for level in (1, 2, 3, 5)] == [(1,), (1,), (1,), (3,)]


def test_posterize_leaves_at_least_one_bit_and_more_where_it_would(prepared: LabelledImages, params: Params) -> None:
    described = colour_crops(prepared, params).augment
    assert described is not None
    augment = described.augment
    (posterize,) = (operation for operation in augment.ops if operation.name == "PosterizeIncreasing")
    assert [posterize.level_fn(level, {}) for level in (0, 5, 9, 10)] == [(4,), (2,), (1,), (1,)]
    others = [operation for operation in augment.ops if not operation.name.startswith("Posterize")]
    assert not any(isinstance(operation.level_fn, functools.partial) for operation in others)


# the classifier


def test_classifier_has_drop_path_that_grows_and_the_encoders_arguments(encoder_folder: Path, params: Params) -> None:
    model = build_classifier(encoder_folder, 7, recipe_of(params, drop_path=0.2))
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])
    assert model.patch_embed.img_size == load_encoder(encoder_folder).patch_embed.img_size
    assert (model.global_pool, model.head.out_features) == ("token", 7)
    assert 1e-5 < model.head.weight.std() < 3e-5
    assert build_classifier(encoder_folder, 7, recipe_of(params, pool="average")).global_pool == "avg"


def test_encoder_without_a_class_token_keeps_its_own_pooling() -> None:
    assert module._pooling(SimpleNamespace(pool="class_token"), "avg") == {}  # type: ignore[arg-type]
    assert module._pooling(SimpleNamespace(pool="class_token"), "token") == {"global_pool": "token"}  # type: ignore[arg-type]
    assert module._pooling(SimpleNamespace(pool="average"), "token") == {"global_pool": "avg"}  # type: ignore[arg-type]


@pytest.mark.parametrize("with_layer", [False, True])
def test_kept_weights_give_the_logits_over_the_temperature(
    with_layer: bool, encoder_folder: Path, params: Params
) -> None:
    recipe = recipe_of(params, interpolation="bicubic")  # not what is taken where nothing is said
    model = build_classifier(encoder_folder, 10, recipe, torch.randn(32, 16) if with_layer else None).eval()
    for parameter in model.head.parameters():
        nn.init.normal_(parameter)
    kept, images = module.kept_classifier(model, recipe, 2.5), torch.randn(4, 1, 8, 8)
    assert (kept.temperature, kept.interpolation, kept.model_args) == (2.5, "bicubic", {"global_pool": "token"})
    assert kept.model is not None
    plain = build_classifier(encoder_folder, 10, recipe).eval()
    plain.load_state_dict(dict(kept.model))
    assert torch.allclose(plain(images), model(images) / 2.5, atol=1e-5)
    with torch.no_grad():
        model.cls_token.add_(1)
    assert not torch.equal(kept.model["cls_token"], model.cls_token)
    assert {tensor.dtype for tensor in kept.model.values()} == {torch.float32}


def test_weight_decay_of_groups_is_timms_rule(encoder_folder: Path, params: Params) -> None:
    model = build_classifier(encoder_folder, 10, recipe_of(params))
    groups = layer_decayed_groups(model, 0.8, recipe_of(params))
    assert [set(group) for group in groups] == [{"params", "weight_decay", "lr"}] * len(groups)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.06}
    of = {id(p): group for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        whole = p.ndim <= 1 or name in ("cls_token", "pos_embed")
        assert of[id(p)]["weight_decay"] == (0 if whole else 0.06), name
    rates = [of[id(model.get_parameter(name))]["lr"] for name in ("head.bias", "norm.bias", "cls_token")]
    assert rates == pytest.approx([0.8, 0.8 / 2, 0.8 / 2**4])


def test_arm_without_a_projector_is_named_once(
    encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"finetune: {encoder_folder.parent.name} has no contrastive projector, its classifier sits on the encoder\n"
    assert module._first_fc(encoder_folder.parent) is None
    assert capsys.readouterr().out == said
    monkeypatch.setattr(module, "launched_rank", lambda: 1)
    assert module._first_fc(encoder_folder.parent) is None
    assert not capsys.readouterr().out
    monkeypatch.undo()
    save_heads(tmp_path, {"a": torch.ones(2, 3)}, "a")
    found = module._first_fc(tmp_path)
    assert found is not None
    assert torch.equal(found, torch.ones(2, 3))
    assert not capsys.readouterr().out


def test_prediction_is_of_whole_images_of_val_and_test(
    session: Session, encoder_folder: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(session.params, drop_path=0.9)
    model, asked, read = build_classifier(encoder_folder, 10, recipe), set[Any](), LabelledImages.whole
    monkeypatch.setattr(LabelledImages, "whole", lambda self, ids, how: asked.add(how) or read(self, ids, how))  # type: ignore[func-returns-value]
    nn.init.normal_(model.head.weight)
    computed, extract = list[Any](), module.extract
    monkeypatch.setattr(module, "extract", lambda *about: computed.append(about[-1]) or extract(*about))  # type: ignore[func-returns-value]
    found = predict(model.train(), FineTuning(encoder_folder.parent, prepared, recipe, session, CPU, None))
    assert asked == {"bicubic"}
    assert computed == [Running.of(session.params.run, CPU)] * 2
    for split in ("val", "test"):
        ids = prepared.ids(split)
        with torch.inference_mode():
            expected = model.eval()(prepared.normalize(prepared.whole(ids, "bicubic"))).numpy()
        assert np.allclose(found.of[split], expected, atol=1e-5)
        assert found.of[split].dtype == np.float32
        assert found.labels[split].tolist() == prepared.labels[ids].tolist()
        assert found.ids[split].tolist() == ids.tolist()
    assert found.of.keys() == found.labels.keys() == found.ids.keys() == {"val", "test"}


@pytest.mark.parametrize(("images", "parts", "batch"), [(7, 3, 6), (13, 2, 12), (2, 1, 2)])
def test_mixed_batches_are_even(images: int, parts: int, batch: int, params: Params) -> None:
    for changes in ({"mixup": 0.8}, {"cutmix": 1.0}):
        assert batch_size_for(images, recipe_of(params, **changes), parts) == batch


def test_every_part_of_a_mixed_batch_is_even(params: Params) -> None:
    assert batch_size_for(6, recipe_of(params), 2) == 6
    with pytest.raises(LgpError, match="6 labelled images a batch cannot be cut into 2 equal parts"):
        batch_size_for(6, recipe_of(params, mixup=0.8), 2)


def test_batch_of_one_or_none_image(params: Params) -> None:
    assert batch_size_for(1, recipe_of(params), 1) == 1
    for images, changes in ((0, {}), (1, {"mixup": 0.8})):
        with pytest.raises(LgpError, match="0 labelled images a batch cannot be cut into 1 equal parts"):
            batch_size_for(images, recipe_of(params, **changes), 1)


# around the trainings


def logits_of(data: LabelledImages, share: float, seed: int) -> Logits:
    """Return logits that are right for about that share of the images."""
    rng, of = np.random.default_rng(seed), {}
    ids = {split: data.ids(split) for split in ("val", "test")}
    for split, those in ids.items():
        right = rng.random(len(those)) < share
        of[split] = 3 * np.eye(10)[np.where(right, data.labels[those], rng.integers(0, 10, len(those)))]
    return Logits(of, {split: data.labels[i] for split, i in ids.items()}, ids)


class Around:
    """Replaces training and prediction: each of the trainings in turn has a share of right images."""

    def __init__(self, data: LabelledImages, shares: list[float], patch: pytest.MonkeyPatch) -> None:
        self.trials: list[tuple[Trial, list[int]]] = []
        self.about: list[FineTuning] = []
        self.logits = [logits_of(data, share, number) for number, share in enumerate(shares)]
        patch.setattr(module, "fit", self.fit)
        patch.setattr(module, "predict", self.predict)
        patch.setattr(module, "kept_classifier", lambda model, recipe, temperature: (model, recipe, temperature))

    def fit(self, shared: FineTuning, trial: Trial, ids: np.ndarray) -> tuple[Any, int]:
        self.trials.append((trial, ids.tolist()))
        self.about.append(shared)
        return f"model {trial.number}", 10**12 * (trial.number + 1) + 1_234_567

    def predict(self, model: Any, *about: Any) -> Logits:
        assert about == (self.about[-1],)
        return self.logits[int(model.split()[1])]


def broken(logits: Logits) -> Logits:
    """Return logits that are not finite."""
    of = {split: x.copy() for split, x in logits.of.items()}
    of["test"][0, 0] = np.nan
    return replace(logits, of=of)


def test_every_rate_trains_on_every_subset_and_the_best_on_val_is_kept(
    session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    around = Around(session.data, [0.2, 0.3, 0.9, 0.6, 0.4, 0.5], monkeypatch)
    subsets, recipe = session.data.subsets("10pct")[:2], recipe_of(session.params, base_lr=[0.1, 0.01, 0.001])
    outcome = finetune(encoder_folder.parent, session.data, subsets, recipe, session)
    assert [ids for _, ids in around.trials] == [subset.tolist() for subset in subsets] * 3
    assert [trial for trial, _ in around.trials] == [
        Trial(number, number % 2, (0.1, 0.01, 0.001)[number // 2]) for number in range(6)
    ]
    arm, labels = encoder_folder.parent.name, len(subsets[0])
    said = [
        f"finetune: {arm}, rate {lr}, subset {s} of 2, {labels} labels" for lr in (0.1, 0.01, 0.001) for s in (1, 2)
    ]
    assert capsys.readouterr().out.splitlines() == said
    temperatures = [logits.temperature_on_val() for logits in around.logits]
    scored = [logits.scored(t) for logits, t in zip(around.logits, temperatures, strict=True)]
    expected = over_subsets(scored[2:4], labels)
    assert outcome.predictions.equals(expected.predictions)
    on_val = [over_subsets(scored[2 * i : 2 * i + 2], labels).metrics["val/top1"] for i in range(3)]
    more = {f"val/top1_at_{lr}": top1 for lr, top1 in zip((0.1, 0.01, 0.001), on_val, strict=True)}
    more |= {"base_lr": 0.01, "diverged": 0.0, "train/pflop": 0.021000007, "first_fc": 0.0}
    assert outcome.metrics == {**expected.metrics, **more}
    assert outcome.classifier == ("model 2", recipe, temperatures[2])  # the better of its two
    shared = around.about[0]
    assert (shared.arm, shared.session, shared.first_fc) == (encoder_folder.parent, session, None)
    assert shared.data.normalization == session.data.normalization


def test_one_rate_has_no_table_of_rates_and_of_equal_ones_the_first_is_taken(
    session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = Around(session.data, [0.5, 0.5, 0.5], monkeypatch)
    around.logits = [around.logits[0]] * 3
    subsets = session.data.subsets("10pct")[:1]
    one = finetune(encoder_folder.parent, session.data, subsets, recipe_of(session.params, base_lr=0.3), session)
    assert not any(name.startswith("val/top1_at") for name in one.metrics)
    recipe = recipe_of(session.params, base_lr=[0.3, 0.2])
    assert finetune(encoder_folder.parent, session.data, subsets, recipe, session).metrics["base_lr"] == 0.3


def test_rate_without_finite_predictions_is_left_out_and_counted(
    session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    around = Around(session.data, [0.5, 0.9, 0.4], monkeypatch)
    around.logits[1] = broken(around.logits[1])
    subsets = session.data.subsets("10pct")[:1]
    recipe = recipe_of(session.params, base_lr=[0.3, 0.2, 0.1])
    outcome = finetune(encoder_folder.parent, session.data, subsets, recipe, session)
    assert outcome.metrics["diverged"] == 1
    assert outcome.metrics.keys() >= {"val/top1_at_0.3", "val/top1_at_0.1"}
    assert "val/top1_at_0.2" not in outcome.metrics
    assert outcome.metrics["train/pflop"] == pytest.approx(0.004, abs=1e-8)  # of the rates that are left
    reason = (
        "finetune: the predictions are not finite at the rate 0.2 per 256 images: lower the learning rate of finetune"
    )
    assert f"warning: finetune: a rate is left out: {reason}" in capsys.readouterr().out.splitlines()
    around.logits = [broken(logits) for logits in around.logits]
    with pytest.raises(Diverged, match=r"not finite at the rate 0\.1 per 256"):
        finetune(encoder_folder.parent, session.data, subsets, recipe, session)


def test_other_process_predicts_and_says_nothing(
    session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    around = Around(session.data, [0.5, 0.9], monkeypatch)
    monkeypatch.setattr(module, "rank", lambda: 1)
    monkeypatch.setattr(module, "predict", lambda *_: pytest.fail("only the first process predicts"))
    with pytest.raises(WorkerDone):
        finetune(
            encoder_folder.parent, session.data, session.data.subsets("10pct")[:2], recipe_of(session.params), session
        )
    assert len(around.trials) == 2
    assert not capsys.readouterr().out
    outcome, flops = module._try_rate(around.about[0], session.data.subsets("10pct")[:2], 0, 0.1)
    assert (outcome.metrics, outcome.predictions.empty, flops) == ({}, True, 3 * 10**12 + 2 * 1_234_567)


def test_predictions_of_the_first_process_stop_all_of_them(
    session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one process finds is agreed upon: 0 where all is finite, 1 where it is not."""
    around, told = Around(session.data, [0.5, 0.9], monkeypatch), list[int]()
    around.logits[1] = broken(around.logits[1])
    monkeypatch.setattr(module, "agree", lambda number: told.append(number) or number)  # type: ignore[func-returns-value]
    recipe = recipe_of(session.params, base_lr=[0.3, 0.2])
    finetune(encoder_folder.parent, session.data, session.data.subsets("10pct")[:1], recipe, session)
    assert told == [0, 1]


def test_disk_memory_device_and_processes_are_asked_for_what_all_trainings_need(
    session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around, asked = Around(session.data, [0.5] * 6, monkeypatch), list[Any]()
    monkeypatch.setattr(module, "choose_device", lambda run: asked.append(run) or CPU)  # type: ignore[func-returns-value]
    monkeypatch.setattr(module, "check_disk_space", lambda *about: asked.append(about))
    monkeypatch.setattr(module, "joined", lambda *about: asked.append(about) or nullcontext())  # type: ignore[func-returns-value]
    monkeypatch.setattr(LabelledImages, "keep_decoded", lambda _, size: asked.append(size))
    subsets, recipe = session.data.subsets("10pct")[:2], recipe_of(session.params, base_lr=[0.1, 0.01, 0.001])
    weights = (encoder_folder / "model.safetensors").stat().st_size
    finetune(encoder_folder.parent, session.data, subsets, recipe, session)
    assert asked == [2**29, session.params.run, (session.store.folder, 6 * weights * 6), ("finetune", CPU)]
    assert {about.device for about in around.about} == {CPU}
    for part, size in (("training0", 1000), ("training1", 300)):  # what is there needs no more room
        (session.store.folder / part).mkdir(parents=True)
        (session.store.folder / part / "state-code.pt").write_bytes(b"0" * size)
    finetune(encoder_folder.parent, session.data, subsets, recipe, session)
    assert asked[6] == (session.store.folder, 6 * weights * 6 - 1300)
    (session.store.folder / "training0" / "state-code.pt").write_bytes(b"0" * 100 * weights)
    finetune(encoder_folder.parent, session.data, subsets, recipe, session)
    assert asked[10] == (session.store.folder, 0)


def test_first_layer_is_read_where_the_recipe_asks_for_it(
    session: Session, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = Around(session.data, [0.5], monkeypatch)
    layer, asked = torch.ones(2, 3), list[Path]()
    monkeypatch.setattr(module, "_first_fc", lambda arm: asked.append(arm) or layer)  # type: ignore[func-returns-value]
    subsets, recipe = session.data.subsets("10pct")[:1], recipe_of(session.params, from_first_fc=True)
    assert finetune(encoder_folder.parent, session.data, subsets, recipe, session).metrics["first_fc"] == 1
    assert (asked, around.about[0].first_fc is layer) == ([encoder_folder.parent], True)


@pytest.mark.parametrize(
    ("on_val", "chosen"), [({0.1: (50, 0.1), 1e-3: (70, 0.9)}, 1e-3), ({0.1: (70, 0.2), 1e-3: (70, 0.1)}, 1e-3)]
)
def test_choice_is_by_val_alone(on_val: dict[float, tuple[float, float]], chosen: float) -> None:
    outcomes = {
        rate: Outcome({"val/top1": top1, "val/brier": brier, "test/top1": -top1, "test/brier": -brier}, pd.DataFrame())
        for rate, (top1, brier) in on_val.items()
    }
    found, metrics = module._choose_rate(outcomes)
    assert found is outcomes[chosen]
    of_rates = {f"val/top1_at_{rate}": top1 for rate, (top1, _) in on_val.items()}
    assert metrics == {"base_lr": chosen} | of_rates


def test_epochs_continue_after_those_of_earlier_trainings() -> None:
    told: list[dict[str, float]] = []
    OneOfMany(SimpleNamespace(log_epoch=told.append), 12).log_epoch({"epoch": 3.0, "train/loss": 1.0})  # type: ignore[arg-type]
    assert told == [{"epoch": 15.0, "train/loss": 1.0}]
