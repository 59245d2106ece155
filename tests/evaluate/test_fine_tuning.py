"""Fine-tuning: what it starts from, at which rates, and that it resumes and repeats to the bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from conftest import ROOT, Silent, is_foreign, merged
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lgp.compute.randomness import Stream
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch
from lgp.errors import Diverged, LgpError
from lgp.evaluate import fine_tuning as module
from lgp.evaluate.fine_tuning import (
    LabelledCrops,
    batch_size_for,
    build_classifier,
    finetune,
    layer_decayed_groups,
)
from lgp.evaluate.outcome import Outcome
from lgp.models.classifier_folder import save_classifier
from lgp.models.encoder_folder import images_for, load_encoder
from lgp.models.heads_file import load_first_fc, save_heads
from lgp.params.evaluate import FineTuneParams
from lgp.params.file import Params, load_params
from lgp.params.section import Interpolation
from lgp.pretrain.arm import Session
from lgp.training.loop import Trainer
from lgp.training.resume_states import StateStore

ALL_TRICKS = {
    "drop_path": 0.2,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}


def recipe(params: Params, **changes: Any) -> FineTuneParams:
    return FineTuneParams.model_validate(params.finetune["10pct"].model_dump() | changes)


def tuned(
    arm: Path,
    data: LabelledImages,
    params: Params,
    folder: Path,
    subsets: int = 2,
    observer: Any = None,
    **changes: Any,
) -> Outcome:
    some = data.subsets("10pct")[:subsets]
    session = Session(data, params, StateStore(folder, "code"), observer or Silent())
    return finetune(arm, data, some, recipe(params, **changes), session)


@pytest.fixture
def arm(encoder_folder: Path) -> Path:
    return encoder_folder.parent


def test_classifier_starts_from_the_encoder(encoder_folder: Path, params: Params) -> None:
    encoder = load_encoder(encoder_folder).state_dict()
    model = build_classifier(encoder_folder, 10, recipe(params))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in encoder.items())
    assert model.head.out_features == 10
    assert model.head.weight.abs().max() < 1e-4
    assert not model.head.bias.any()
    assert all(p.requires_grad for p in model.parameters())


def test_averaged_patches_get_a_norm_of_their_own(encoder_folder: Path, params: Params) -> None:
    model = build_classifier(encoder_folder, 10, recipe(params, pool="average")).eval()
    images = torch.randn(2, 1, 8, 8)
    tokens = model.forward_features(images)
    expected = model.head(model.fc_norm(tokens[:, 1:].mean(dim=1)))
    assert torch.allclose(model(images), expected)
    assert torch.equal(model.blocks[0].attn.qkv.weight, load_encoder(encoder_folder).blocks[0].attn.qkv.weight)


def test_first_layer_of_the_projector_stays_below_the_classifier(
    encoder_folder: Path, params: Params, prepared: LabelledImages, tmp_path: Path
) -> None:
    first_fc = torch.randn(32, 16)
    model = build_classifier(encoder_folder, 10, recipe(params, from_first_fc=True), first_fc)
    assert torch.equal(model.head[0].weight, first_fc)
    assert model.head[0].bias is None
    assert model.head[1].weight.shape == (10, 32)
    without = tuned(encoder_folder.parent, prepared, params, tmp_path / "a", from_first_fc=True)
    assert without.metrics["first_fc"] == 0
    assert without.metrics == tuned(encoder_folder.parent, prepared, params, tmp_path / "b").metrics


def test_first_layer_is_found_among_an_arms_heads(
    encoder_folder: Path, params: Params, prepared: LabelledImages, tmp_path: Path
) -> None:
    arm = tmp_path / "joint"
    arm.mkdir()
    (arm / "encoder").symlink_to(encoder_folder)
    heads = {"contrastive.projector.0.weight": torch.randn(32, 16), "mae.mask_token": torch.zeros(1)}
    save_heads(arm, heads, "contrastive.projector.0.weight")
    first_fc = load_first_fc(arm)
    assert first_fc is not None
    assert torch.equal(first_fc, heads["contrastive.projector.0.weight"])
    outcome = tuned(arm, prepared, params, tmp_path / "states", from_first_fc=True)
    assert outcome.metrics["first_fc"] == 1
    save_heads(arm, heads, None)
    assert load_first_fc(arm) is None


def test_encoder_sees_images_with_its_own_statistics_in_training_and_prediction(
    foreign_folder: Path, params: Params, prepared: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    build = module.build_classifier

    def watched(*about: Any) -> Any:
        model = build(*about)
        model.register_forward_pre_hook(lambda model, inputs: seen[model.training].append(inputs[0]))
        return model

    monkeypatch.setattr(module, "build_classifier", watched)
    tuned(foreign_folder.parent, prepared, params, tmp_path / "states", subsets=1)
    for images in seen.values():
        assert images
        assert all(map(is_foreign, images))


@pytest.mark.parametrize("changes", [{}, {"pool": "average"}, {"from_first_fc": True}])
def test_kept_classifier_gives_the_predictions_of_its_subset(
    encoder_folder: Path, prepared: LabelledImages, params: Params, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Plain timm loads it, and resizes and normalises as its configuration says."""
    shutil.copytree(encoder_folder, tmp_path / "arm" / "encoder")
    save_heads(tmp_path / "arm", {"first": torch.randn(32, 16)}, "first" if changes.get("from_first_fc") else None)
    outcome = tuned(tmp_path / "arm", prepared, params, tmp_path / "states", **changes)
    assert outcome.classifier is not None
    save_classifier(tmp_path / "c", encoder_folder, outcome.classifier, prepared.classes, {})
    model = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    images = images_for(encoder_folder, prepared)
    ids, how = images.ids("test"), recipe(params).interpolation
    with torch.inference_mode():
        probabilities = model(images.normalize(images.whole(ids, how))).softmax(1).numpy()
    tables = [table for _, table in outcome.predictions.groupby("subset")]
    off = [np.abs(table["confidence"].to_numpy() - probabilities.max(1)).max() for table in tables]
    assert min(off) < 1e-4
    best = tables[int(np.argmin(off))]
    assert best["prediction"].tolist() == probabilities.argmax(1).tolist()


def test_projector_does_not_take_averaged_patches(params: Params) -> None:
    with pytest.raises(ValueError, match="set pool to class_token"):
        recipe(params, from_first_fc=True, pool="average")


def test_rates_decay_with_every_layer_below(encoder_folder: Path, params: Params) -> None:
    """BEiT's rule, written out: embeddings are layer 0, block i is i + 1, the head the last; timm's norm a block's."""
    settings = recipe(params, layer_decay=0.5)
    model = build_classifier(encoder_folder, 10, settings)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in layer_decayed_groups(model, 1.0, settings)
        for p in group["params"]
    }
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (rate, decay) in found.items():
        of_others = {"norm": 3, "head": 4}
        layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else of_others.get(name.split(".")[0], 0)
        assert rate == pytest.approx(0.5 ** (4 - layer)), name
        undecayed = model.get_parameter(name).ndim <= 1 or name in ("cls_token", "pos_embed")
        assert decay == (0.0 if undecayed else settings.weight_decay), name


@pytest.mark.parametrize("tricks", [{}, ALL_TRICKS], ids=["plain", "all_tricks"])
def test_same_seed_same_numbers(
    arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path, tricks: Any
) -> None:
    torch.manual_seed(1)
    one = tuned(arm, prepared, params, tmp_path / "a", **tricks)
    np.random.seed(5)
    torch.manual_seed(2)
    two = tuned(arm, prepared, params, tmp_path / "b", **tricks)
    assert one.metrics == two.metrics
    assert one.predictions.equals(two.predictions)
    other = tuned(arm, prepared, Params.model_validate(params.model_dump() | {"seed": 9}), tmp_path / "c", **tricks)
    assert not one.predictions["confidence"].equals(other.predictions["confidence"])


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def log_epoch(self, values: dict[str, float]) -> None:
        self.epochs.append(values)


def test_interrupted_in_the_second_subset_goes_on_there_to_the_bit(
    arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**ALL_TRICKS, "batch_size": 6}
    whole = tuned(arm, prepared, params, tmp_path / "a", **settings)
    step, steps = Trainer._step, []

    def counted(trainer: Trainer, *rest: Any) -> None:
        step(trainer, *rest)
        steps.append(trainer.now.step)

    def interrupted(trainer: Trainer, *rest: Any) -> None:
        counted(trainer, *rest)
        if trainer.store.folder.name == "training1":
            trainer._check_losses()
            trainer._save()
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(arm, prepared, params, tmp_path / "b", **settings)
    before = len(steps)
    monkeypatch.setattr(Trainer, "_step", counted)
    told = Recorder()
    resumed = tuned(arm, prepared, params, tmp_path / "b", observer=told, **settings)
    per_subset = before - 1
    assert len(steps) - before == per_subset - 1  # but one step of the second was done
    assert resumed.metrics == whole.metrics
    assert resumed.predictions.equals(whole.predictions)
    assert [values["epoch"] for values in told.epochs] == [1, 2, 3, 4]


def test_states_of_all_subsets_go_with_the_stage(
    arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path
) -> None:
    store = StateStore(tmp_path / "states", "code")
    store.acquire()
    session = Session(prepared, params, store, Silent())
    finetune(arm, prepared, prepared.subsets("10pct")[:2], recipe(params), session)
    assert store.has_state()
    assert {file.parent.name for file in store.folder.rglob("state-*.pt")} == {"training0", "training1"}
    store.close(True)
    assert not (tmp_path / "states").exists()


def test_state_that_other_code_left_is_adopted_for_every_subset(
    arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Session(prepared, params, StateStore(tmp_path / "states", "old code"), Silent())
    outcome = finetune(arm, prepared, prepared.subsets("10pct")[:2], recipe(params), old)
    new = StateStore(tmp_path / "states", "new code")
    new.adopt()
    assert new.adopted() is not None
    monkeypatch.setattr(Trainer, "_step", lambda *_: pytest.fail("it was finished"))
    session = Session(prepared, params, new, Silent())
    again = finetune(arm, prepared, prepared.subsets("10pct")[:2], recipe(params), session)
    assert again.metrics == outcome.metrics


def test_rand_augment_changes_the_crops_as_the_step_says(prepared: LabelledImages, params: Params) -> None:
    ids = prepared.subsets("10pct")[0]
    plain, augmented, again = (
        LabelledCrops(prepared, recipe(params, rand_augment=given), 20, Stream(0, "f"), ids)
        for given in (None, "rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1")
    )
    assert augmented[1].shape == plain[1].shape == (20, 1, 1, 8, 8)
    assert not torch.equal(augmented[0], plain[0])
    assert torch.equal(augmented[1], again[1])
    again.shard(1, 2)  # the second of two processes sees its half of the same
    assert torch.equal(augmented[0][10:], again[0])
    labels = plain.labels(Batch.whole(plain[0], 0))
    assert labels.tolist() == prepared.labels[plain.ids_of(0)].tolist()


def test_rand_augment_of_full_strength_keeps_a_bit(prepared: LabelledImages, params: Params) -> None:
    ids = prepared.ids("train")
    crops = LabelledCrops(prepared, recipe(params, rand_augment="rand-m10-n4-inc1"), len(ids), Stream(0, "f"), ids)
    assert crops[0].shape == (len(ids), 1, 1, 8, 8)


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_presets_are_built(preset: Path, prepared: LabelledImages) -> None:
    ids = prepared.subsets("10pct")[0]
    for settings in load_params(preset).finetune.values():
        assert LabelledCrops(prepared, settings, 4, Stream(0, "f"), ids)[0].shape == (4, 1, 1, 8, 8)


def test_rand_augment_that_timm_does_not_know_is_refused(params: Params) -> None:
    for wrong in ("rand-q3", "rand-m9# a comment", "auto"):
        with pytest.raises(ValueError, match=r"like rand-m9-mstd0\.5-inc1"):
            recipe(params, rand_augment=wrong)


def test_shuffling_test_labels_changes_no_prediction(
    arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = tuned(arm, prepared, params, tmp_path / "a")
    test, labels = prepared.ids("test"), prepared.labels.copy()
    labels[test] = np.random.default_rng(0).permutation(labels[test])
    monkeypatch.setattr(prepared, "labels", labels)
    shuffled = tuned(arm, prepared, params, tmp_path / "b")
    assert right.predictions["prediction"].tolist() == shuffled.predictions["prediction"].tolist()
    assert right.metrics["val/top1"] == shuffled.metrics["val/top1"]
    assert right.predictions["label"].tolist() != shuffled.predictions["label"].tolist()


def test_validation_chooses_the_rate_that_is_reported(
    arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path
) -> None:
    more = {"epochs": 20, "crop_scale_min": 0.8, "batch_size": 20, "pool": "average", "layer_decay": 1.0}
    alone = {
        rate: tuned(arm, prepared, params, tmp_path / f"{rate}", base_lr=rate, **more) for rate in (1e-9, 0.2, 0.1)
    }
    on_val = {rate: outcome.metrics["val/top1"] for rate, outcome in alone.items()}
    *_, best = in_order = sorted(alone, key=lambda rate: on_val[rate])  # so the best is neither first nor by default
    assert len(set(on_val.values())) == 3
    outcome = tuned(arm, prepared, params, tmp_path / "grid", base_lr=in_order, **more)
    assert outcome.metrics["base_lr"] == best
    assert {rate: outcome.metrics[f"val/top1_at_{rate:g}"] for rate in alone} == on_val
    assert outcome.predictions.equals(alone[best].predictions)
    flops = sum(of_rate.metrics["train/pflop"] for of_rate in alone.values())
    assert outcome.metrics["train/pflop"] == pytest.approx(flops, abs=2e-9)  # each is rounded
    assert "val/top1_at_0.1" not in alone[0.1].metrics


def test_rate_that_diverges_is_left_out(
    arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tuned(arm, prepared, params, tmp_path / "alone", base_lr=1e-2)
    grid = tuned(arm, prepared, params, tmp_path / "grid", base_lr=[1e30, 1e-2])
    assert grid.predictions.equals(alone.predictions)
    assert (grid.metrics["base_lr"], grid.metrics["diverged"], alone.metrics["diverged"]) == (1e-2, 1, 0)
    assert "warning: finetune: a rate is left out: finetune: " in capsys.readouterr().out
    for rates in (1e30, [1e30, 1e35]):
        with pytest.raises(Diverged, match="lower the learning rate of finetune"):
            tuned(arm, prepared, params, tmp_path / "none", base_lr=rates)


def test_test_images_are_resized_as_the_recipe_says(
    arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    whole = LabelledImages.whole

    def spied(data: LabelledImages, ids: np.ndarray, interpolation: Interpolation) -> torch.Tensor:
        asked.append(interpolation)
        return whole(data, ids, interpolation)

    monkeypatch.setattr(LabelledImages, "whole", spied)
    tuned(arm, prepared, params, tmp_path / "a", subsets=1)
    assert set(asked) == {"bicubic"}
    asked.clear()
    tuned(arm, prepared, params, tmp_path / "b", subsets=1, interpolation="bilinear")
    assert set(asked) == {"bilinear"}


def test_rand_augment_turns_images_as_the_recipe_resizes(prepared: LabelledImages, params: Params) -> None:
    ids = prepared.subsets("10pct")[0]
    for name, mode in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        given = recipe(params, rand_augment="rand-m9-mstd0.5-inc1", interpolation=name)
        augmentation = LabelledCrops(prepared, given, 4, Stream(0, "f"), ids).augment
        assert augmentation is not None
        assert all(operation.hparams["interpolation"] == mode for operation in augmentation.augment.ops)


def test_batch_is_what_so_few_images_fill(params: Params) -> None:
    assert batch_size_for(1000, recipe(params, batch_size=64), 1) == 64
    assert batch_size_for(13, recipe(params, batch_size=64), 1) == 13
    assert batch_size_for(13, recipe(params, batch_size=64, mixup=0.8), 1) == 12
    assert batch_size_for(130, recipe(params, batch_size=64, mixup=0.8), 4) == 64
    with pytest.raises(LgpError, match=r"12 labelled images a batch cannot be cut into 4 equal parts"):
        batch_size_for(13, recipe(params, batch_size=64, mixup=0.8), 4)
    with pytest.raises(LgpError, match=r"3 labelled images a batch cannot be cut into 4 equal parts.*lower these"):
        batch_size_for(3, recipe(params), 4)


def test_more_epochs_learn_the_labels(arm: Path, prepared: LabelledImages, params: Params, tmp_path: Path) -> None:
    tricks = {"pool": "average", "layer_decay": 1.0, "warmup_epochs": 1, "batch_size": 22, "crop_scale_min": 0.8}
    outcomes = []
    for number, changes in enumerate(({"epochs": 2, "base_lr": 1e-9}, {"epochs": 40, "base_lr": 0.1})):
        session = Session(prepared, params, StateStore(tmp_path / str(number), "code"), Silent())
        outcomes.append(finetune(arm, prepared, prepared.labelled("all"), recipe(params, **tricks, **changes), session))
    barely, learnt = (outcome.metrics for outcome in outcomes)
    assert learnt["test/top1"] > barely["test/top1"] + 20
    assert learnt["labels"] == 220
    # forward and backward of a batch of 22, of which 220 images are ten
    model = build_classifier(arm / "encoder", 10, recipe(params, **tricks))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(22, 1, 8, 8)).sum().backward()
    assert learnt["train/pflop"] == round(40 * 10 * counter.get_total_flops() / 1e15, 9)
    assert barely["train/pflop"] == round(2 * 10 * counter.get_total_flops() / 1e15, 9)


def test_two_processes_fine_tune_to_the_same(
    tmp_path: Path, values: dict[str, Any], prepared: LabelledImages, arm: Path
) -> None:
    confidence = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        labels = prepared.folder.parent / "labels"
        for name, there in (("data/prepared", prepared.folder), ("data/labels", labels)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(there)
        shutil.copytree(arm, folder / "models" / "cl")  # it gets a classifier, which other tests are not to find
        changes = {"finetune": {"10pct": {"drop_path": 0.0}}, "run": {"processes": processes}}
        (folder / "params.yaml").write_text(yaml.safe_dump(merged(values, changes)))
        environment = {k: v for k, v in os.environ.items() if k not in ("DVC_ROOT", "MLFLOW_TRACKING_URI")}
        command = [sys.executable, str(ROOT / "cli.py"), "finetune", "cl", "10pct"]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        predictions = pd.read_parquet(folder / "predictions" / "cl-finetune-10pct.parquet")
        confidence.append(predictions["confidence"])
        assert not list((folder / ".lgp" / "resume").rglob("state-*"))
    assert np.allclose(*confidence, rtol=1e-4)


def test_recipe_is_by_the_labels_name(params: Params, values: dict[str, Any]) -> None:
    assert params.recipe("10pct") is params.finetune["10pct"]
    with pytest.raises(LgpError, match=r"no recipe finetune.1pct, only 10pct: add it"):
        params.recipe("1pct")
    with pytest.raises(ValueError, match=r"no recipe finetune.1pct: add it"):
        Params.model_validate(merged(values, {"finetuned": ["1pct"]}))
