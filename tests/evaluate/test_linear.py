"""Evaluation with all labels: what chooses, and that the test part never does."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Silent, is_foreign
from scipy.special import softmax
from sklearn.neighbors import KNeighborsClassifier

from lgp.data.labels import LabelledImages
from lgp.evaluate import linear as module
from lgp.evaluate.linear import evaluate_linear, evaluate_linear_augmented
from lgp.evaluate.outcome import Outcome
from lgp.features.cache import FeatureCache, Features, pixel_source
from lgp.features.extraction import ALONE
from lgp.features.of_encoder import encoder_source
from lgp.models.encoder_folder import save_pixels
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params
from lgp.pretrain.arm import Session
from lgp.training.loop import Trainer
from lgp.training.resume_states import StateStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def features(prepared: LabelledImages, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Features:
    source = encoder_source(encoder_folder, FeatureParams(), ALONE)
    return FeatureCache(tmp_path_factory.mktemp("cache"), FeatureParams(), 1.0).features(source, prepared)


def with_shuffled_test_labels(features: Features) -> Features:
    return replace(features, y={**features.y, "test": np.random.default_rng(0).permutation(features.y["test"])})


def evaluated(features: Features, params: Params) -> Outcome:
    return evaluate_linear(features, params.linear, params.seed, CPU, params.run)


def test_shuffling_test_labels_changes_no_choice(prepared: LabelledImages, params: Params, tmp_path: Path) -> None:
    pixels = FeatureCache(tmp_path, FeatureParams(), 1.0).features(pixel_source(), prepared)
    right, shuffled = (evaluated(f, params) for f in (pixels, with_shuffled_test_labels(pixels)))
    assert [right.metrics[k] for k in ("base_lr", "weight_decay", "val/top1", "val/knn_top1")] == [
        shuffled.metrics[k] for k in ("base_lr", "weight_decay", "val/top1", "val/knn_top1")
    ]
    assert right.predictions["prediction"].tolist() == shuffled.predictions["prediction"].tolist()
    assert right.metrics["test/top1"] > 2 * shuffled.metrics["test/top1"]


def test_every_metric_is_there_and_knn_is_of_each_block(features: Features, params: Params) -> None:
    metrics = evaluated(features, params).metrics
    assert next(iter(metrics)) == "test/top1"
    assert metrics["labels"] == len(features.y["train"])
    assert metrics["base_lr"] in params.linear.base_lrs
    theirs = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    for block, (train, test) in enumerate(zip(features.by_block["train"], features.by_block["test"], strict=True)):
        score = 100 * theirs.fit(train, features.y["train"]).score(test, features.y["test"])
        assert metrics[f"test/knn_top1_block{block}"] == pytest.approx(score, abs=2)  # images at equal votes
    assert metrics["test/knn_top1"] == metrics["test/knn_top1_block2"]
    assert metrics["knn_k"] == params.linear.knn_k


@pytest.mark.parametrize("batch_norm", [True, False])
def test_kept_head_gives_the_predictions(features: Features, params: Params, batch_norm: bool) -> None:
    linear = params.linear.model_copy(update={"batch_norm": batch_norm})
    outcome = evaluate_linear(features, linear, params.seed, CPU, params.run)
    assert outcome.classifier is not None
    assert outcome.classifier.head is not None
    logits = outcome.classifier.head.logits(np.asarray(features.x["test"], dtype=np.float64))
    assert outcome.predictions["prediction"].tolist() == logits.argmax(1).tolist()
    assert np.abs(outcome.predictions["confidence"] - softmax(logits, axis=1).max(1)).max() < 1e-4


def test_augmented_probe_learns_from_live_features_and_resumes_to_the_bit(
    prepared: LabelledImages, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = {"method": "augmented", "crop_scale_min": 0.6, "flip_p": 0.0, "epochs": 8, "batch_size": 64}
    params = Params.model_validate(values | {"linear": values["linear"] | linear})
    features = FeatureCache(tmp_path, FeatureParams(), 1.0).features(pixel_source(), prepared)
    encoder = tmp_path / "pixels" / "encoder"
    save_pixels(encoder, prepared, {})

    def augmented(folder: str) -> Outcome:
        store = StateStore(tmp_path / folder, "code")
        return evaluate_linear_augmented(features, encoder, prepared, Session(prepared, params, store, Silent()), CPU)

    whole = augmented("a")
    assert whole.metrics["test/top1"] > 50
    step = Trainer._step

    def interrupted(trainer: Trainer, *rest: Any) -> None:
        step(trainer, *rest)
        if trainer.now.step == 13:
            trainer._check_losses()
            trainer._save()
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        augmented("b")
    monkeypatch.setattr(Trainer, "_step", step)
    resumed = augmented("b")
    assert resumed.metrics == whole.metrics
    assert resumed.predictions.equals(whole.predictions)


def test_augmented_probe_shows_the_encoder_images_with_its_own_statistics(
    prepared: LabelledImages,
    features: Features,
    values: dict[str, Any],
    foreign_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = {"method": "augmented", "epochs": 1, "batch_size": 64}
    params = Params.model_validate(values | {"linear": values["linear"] | linear})
    session, seen = Session(prepared, params, StateStore(tmp_path, "code"), Silent()), []
    live = module.live_features_of

    def spied(*about: Any) -> Any:
        encode = live(*about)
        return lambda images: seen.append(images) or encode(images)  # type: ignore[func-returns-value]

    monkeypatch.setattr(module, "live_features_of", spied)
    evaluate_linear_augmented(features, foreign_folder, prepared, session, CPU)
    assert seen
    assert all(is_foreign(images) for images in seen)
