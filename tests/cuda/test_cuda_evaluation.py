"""Evaluation on a CUDA device equals evaluation on the CPU, to a tolerance. Without a device it is skipped."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from card import CARD, CPU, ON_CARD, full_products  # noqa: F401 - a fixture
from conftest import Silent

from lgp.data.labels import LabelledImages
from lgp.evaluate.few_labels import evaluate_propagation
from lgp.evaluate.fine_tuning import finetune
from lgp.evaluate.linear import evaluate_linear
from lgp.evaluate.logistic import fit_logistic
from lgp.evaluate.propagation import affinity, find_neighbours, propagated
from lgp.evaluate.regression import Problems, Regressions
from lgp.evaluate.ridge import fit_ridge
from lgp.features.cache import FeatureCache, Features
from lgp.features.extraction import ALONE, by_block_of, extract
from lgp.features.knn import knn_predict
from lgp.features.of_encoder import encoder_source
from lgp.models.classifier_folder import save_classifier
from lgp.models.encoder_folder import images_for, load_encoder
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params
from lgp.pretrain.arm import Session
from lgp.training.resume_states import StateStore

pytestmark = ON_CARD
RNG = np.random.default_rng(0)


@pytest.fixture
def features(prepared: LabelledImages, encoder_folder: Path, tmp_path: Path) -> Features:
    source = encoder_source(encoder_folder, FeatureParams(), ALONE)
    return FeatureCache(tmp_path / "cache", FeatureParams(), 1.0).features(source, prepared)


def test_features_equal_those_of_the_cpu(prepared: LabelledImages, encoder_folder: Path) -> None:
    data, ids = images_for(encoder_folder, prepared), prepared.ids("train")[:100]
    here, there = (
        extract(by_block_of(load_encoder(encoder_folder), "class_token", 3, device), data, ids)
        for device in (CPU, CARD)
    )  # fmt: skip
    assert there.shape == here.shape == (100, 3, 16)
    assert there.dtype == np.float32
    assert np.linalg.norm(there - here) < 1e-4 * np.linalg.norm(here)


def test_nearest_neighbours_equal_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgp.features.knn.CANDIDATES", 300)
    train, queries = (RNG.normal(size=(n, 32)).astype(np.float32) for n in (1000, 200))
    labels = RNG.integers(0, 5, 1000)
    here, there = (knn_predict(train, labels, queries, 5, 20, 0.07, device) for device in (CPU, CARD))
    assert (here == there).mean() > 0.99  # two neighbours may be equally near
    found = [find_neighbours(train, 10, device) for device in (CPU, CARD)]
    assert np.allclose(found[0].cosines, found[1].cosines, atol=1e-5)
    assert (found[0].rows == found[1].rows).mean() > 0.99


def test_propagated_labels_equal_those_of_the_cpu() -> None:
    x = np.concatenate([RNG.normal(size=(200, 16)) + 2 * np.eye(16)[c] for c in range(4)]).astype(np.float32)
    known = np.full(800, -1)
    known[::50] = np.repeat(np.arange(4), 200)[::50]
    spread = [
        propagated(affinity(find_neighbours(x, 10, device), 10, 3.0), known, 4, 0.95, "equal") for device in (CPU, CARD)
    ]
    assert (spread[0].labels == spread[1].labels).mean() > 0.99
    assert np.abs(spread[0].confidence - spread[1].confidence).mean() < 1e-3


@pytest.mark.parametrize("method", [fit_logistic, fit_ridge])
def test_regressions_equal_those_of_the_cpu(method: Callable[..., Iterator[Regressions]]) -> None:
    x, y = RNG.normal(size=(2, 120, 16)), np.tile(np.arange(120) % 5, (2, 3, 1))
    weight = RNG.random((2, 3, 120)) * (RNG.random((2, 3, 120)) < 0.8)
    here, there = (method(Problems(x, y, weight, 5, True, device), [0.01, 10]) for device in (CPU, CARD))
    for one, other in zip(here, there, strict=True):
        assert one.converged.all()
        assert other.converged.all()
        assert np.abs(one.weight - other.weight).max() < 1e-4
        assert np.abs(one.bias - other.bias).max() < 1e-4


def test_propagation_has_the_accuracy_of_the_cpu(prepared: LabelledImages, features: Features, params: Params) -> None:
    few = prepared.subsets("10pct")[:1]
    here, there = (
        evaluate_propagation(features, few, params.fewshot, params.propagation, device).metrics["test/top1"]
        for device in (CPU, CARD)
    )
    assert there == pytest.approx(here, abs=2.0)


def test_linear_probe_and_knn_have_the_accuracy_of_the_cpu(features: Features, params: Params) -> None:
    full = params.run.model_copy(update={"precision": "fp32"})
    here, there = (evaluate_linear(features, params.linear, 0, device, full).metrics for device in (CPU, CARD))
    assert here["test/top1"] > 12  # ten classes, and an untrained encoder
    for name in ("test/top1", "test/knn_top1"):
        assert there[name] == pytest.approx(here[name], abs=2.0), name


def test_linear_probe_in_bf16_has_the_accuracy_of_fp32(features: Features, params: Params) -> None:
    full, mixed = (
        evaluate_linear(
            features, params.linear, 0, CARD, params.run.model_copy(update={"precision": precision})
        ).metrics["test/top1"]
        for precision in ("fp32", "bf16")
    )  # fmt: skip
    assert mixed == pytest.approx(full, abs=5.0)


def test_fine_tuned_classifier_is_saved_and_loaded(
    prepared: LabelledImages, encoder_folder: Path, params: Params, tmp_path: Path
) -> None:
    on_card = params.model_copy(update={"run": params.run.model_copy(update={"device": CARD.type})})
    tricks = {"drop_path": 0.2, "rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "mixup": 0.8}
    recipe = params.finetune["10pct"].model_copy(update=tricks | {"cutmix": 1.0, "label_smoothing": 0.1})
    session = Session(prepared, on_card, StateStore(tmp_path / "state", "code"), Silent())
    outcome = finetune(encoder_folder.parent, prepared, prepared.subsets("10pct")[:1], recipe, session)
    assert outcome.classifier is not None
    save_classifier(tmp_path / "classifier", encoder_folder, outcome.classifier, list("0123456789"), {})
    model = timm.create_model(f"local-dir:{tmp_path / 'classifier'}", pretrained=True).eval()
    images = images_for(encoder_folder, prepared)
    with torch.inference_mode():
        predicted = model(images.normalize(images.whole(prepared.ids("test")))).argmax(1).numpy()
    ours = outcome.predictions
    agreeing = (ours.set_index("id").loc[prepared.ids("test"), "prediction"].to_numpy() == predicted).mean()
    assert agreeing > 0.95
    assert outcome.metrics["train/pflop"] > 0


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_fine_tuning_with_stochastic_depth_is_as_accurate(
    prepared: LabelledImages, encoder_folder: Path, params: Params, tmp_path: Path
) -> None:
    recipe = params.finetune["10pct"].model_copy(update={"drop_path": 0.2, "epochs": 5})
    top1, frames = [], torch._dynamo.utils.counters["frames"]
    for compiled in (False, True):
        run = params.run.model_copy(update={"device": CARD.type, "compile": compiled})
        session = Session(
            prepared, params.model_copy(update={"run": run}), StateStore(tmp_path / str(compiled), "code"), Silent()
        )
        torch._dynamo.reset()
        frames.clear()
        outcome = finetune(encoder_folder.parent, prepared, prepared.subsets("10pct")[:1], recipe, session)
        top1.append(outcome.metrics["test/top1"])
        assert frames["ok"] == frames["total"]
        assert bool(frames["ok"]) == compiled
    assert top1[1] == pytest.approx(top1[0], abs=5)
