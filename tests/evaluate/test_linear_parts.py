"""What the linear evaluation is built from: heads, batches, the choice, and k-NN. Nothing is trained."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Silent, merged
from torch import Tensor

from lgp.compute.randomness import Stream, generator
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.errors import LgpError
from lgp.evaluate import linear as module
from lgp.evaluate.linear import evaluate_linear, evaluate_linear_augmented
from lgp.evaluate.outcome import Logits, accuracy_metrics, over_subsets, percent
from lgp.evaluate.probe import LinearHeads
from lgp.features.cache import Features
from lgp.features.knn import knn_predict
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params
from lgp.params.pretrain import ViewParams
from lgp.pretrain.arm import Session
from lgp.training.optimizer import warmup_cosine
from lgp.training.resume_states import StateStore

CPU, CLASSES, WIDTH = torch.device("cpu"), 10, 6
SECTION = {"epochs": 4, "batch_size": 50, "base_lrs": [0.1, 1.0], "weight_decays": [0, 0.1], "knn_k": 3, "flip_p": 0.5}


@pytest.fixture
def params(values: dict[str, Any]) -> Params:
    more = {"crop_scale_min": 0.4, "knn_temperature": 0.2, "batch_norm": False}
    return Params.model_validate(merged(values, {"seed": 6, "linear": SECTION | more, "run": {"decoded_gib": 0.5}}))


@pytest.fixture
def features(prepared: LabelledImages) -> Features:
    """Two blocks of random features that hint at the class."""
    rng = np.random.default_rng(0)
    ids = {split: prepared.ids(split) for split in ("train", "val", "test")}
    ids["train"] = ids["train"][:170]  # fewer than there are
    y = {split: prepared.labels[i] for split, i in ids.items()}
    middle = rng.normal(size=(CLASSES, WIDTH))
    by_block = {
        split: [(middle[of] + rng.normal(size=(len(of), WIDTH))).astype(np.float32) for _ in range(2)]
        for split, of in y.items()
    }
    x = {split: of[-1] for split, of in by_block.items()}
    pooling = FeatureParams(pool="average", blocks=2)
    return Features(x=x, y=y, ids=ids, by_block=by_block, classes=CLASSES, params=pooling)


SETTINGS = [(lr * 50 / 256, decay) for lr in (0.1, 1.0) for decay in (0, 0.1)]


def same_start(heads: LinearHeads) -> bool:
    """Say whether heads are those of these features, of the seed and of the settings."""
    expected = LinearHeads(WIDTH, CLASSES, SETTINGS, False, generator(6, "linear/init"))
    return heads.settings == SETTINGS and torch.equal(heads.weight, expected.weight)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace scoring: what it was asked about."""
    asked: list[Any] = []
    monkeypatch.setattr(module, "_outcome", lambda *about: asked.append(about) or "outcome")  # type: ignore[func-returns-value]
    return asked


def test_sweep_trains_the_heads_of_the_seed_and_scores_them(
    features: Features, params: Params, chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "choose_precision", lambda *about: asked.append(about) or torch.bfloat16)  # type: ignore[func-returns-value]
    monkeypatch.setattr(module, "place", lambda *about: asked.append(about))
    monkeypatch.setattr(module, "train_heads", lambda *about: asked.append(about))
    assert evaluate_linear(features, params.linear, 6, CPU, params.run) == "outcome"
    of_precision, placed, (heads, x, y, *rest) = asked
    assert of_precision == (params.run, CPU, WIDTH)
    assert placed == (heads, CPU, torch.bfloat16)
    assert x is features.x["train"]
    assert y is features.y["train"]
    assert rest == [4, 50, 6, torch.bfloat16]
    assert same_start(heads)
    assert chosen == [(heads, features, params.linear, CPU)]


class Fixed:
    """A trainer that does no step, and keeps what it was given."""

    made: list["Fixed"]

    def __init__(self, **given: Any) -> None:
        self.given, self.fitted = SimpleNamespace(**given), False
        self.made.append(self)

    def fit(self) -> None:
        self.fitted = True


def test_augmented_probe_trains_on_live_features_of_crops(
    features: Features,
    params: Params,
    prepared: LabelledImages,
    encoder_folder: Path,
    tmp_path: Path,
    chosen: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Fixed.made, asked = [], list[Any]()
    projection = torch.randn(64, WIDTH)

    def encode(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        return images.flatten(1) @ projection

    monkeypatch.setattr(module, "Trainer", Fixed)
    monkeypatch.setattr(module, "live_features_of", lambda *about: asked.append(about) or encode)  # type: ignore[func-returns-value]
    monkeypatch.setattr(module, "choose_precision", lambda *about: asked.append(about) or torch.bfloat16)  # type: ignore[func-returns-value]
    monkeypatch.setattr(module, "place", lambda *about: asked.append(about))
    monkeypatch.setattr(LabelledImages, "keep_decoded", lambda _, size: asked.append(size))
    session = Session(prepared, params, StateStore(tmp_path, "code"), Silent())
    assert evaluate_linear_augmented(features, encoder_folder, prepared, session, CPU) == "outcome"
    (trainer,) = Fixed.made
    given, heads = trainer.given, trainer.given.model
    assert trainer.fitted
    assert asked == [
        (encoder_folder, params.features, CPU), (params.run, CPU, WIDTH), (heads, CPU, torch.bfloat16), 2**29
    ]  # fmt: skip
    assert same_start(heads)
    assert chosen == [(heads, features, params.linear, CPU)]
    assert (given.name, given.epochs, given.device, given.precision) == ("linear", 4, CPU, torch.bfloat16)
    assert (given.settings, given.store, given.observer) == (params.run, session.store, session.observer)
    views = ViewParams(crop_scale_min=0.4, flip_p=0.5)
    crops = CropDataset(prepared, views, 1, 50, Stream(6, "linear"), features.ids["train"])
    assert torch.equal(given.crops[3], crops[3])
    assert given.crops.ids.tolist() == features.ids["train"].tolist()
    schedule = warmup_cosine(given.optimizer, 4 * crops.steps_per_epoch, 0)
    assert [given.schedule._get_lr(step) for step in (0, 3, 11)] == [schedule._get_lr(step) for step in (0, 3, 11)]
    assert given.schedule._get_lr(0) == [heads.rate]
    rows = slice(10, 25)
    with torch.autocast("cpu", torch.bfloat16):
        loss = given.loss_of(Batch(crops[3][rows], 3, rows, 50))
    labels = torch.from_numpy(prepared.labels[crops.ids_of(3)[rows]])
    x = prepared.normalize(crops[3][rows, 0]).flatten(1) @ projection
    with torch.autocast("cpu", torch.bfloat16):
        expected = heads.loss(x, labels)
    assert torch.equal(loss, expected)
    assert loss.requires_grad


def test_batch_is_at_most_the_number_of_images(features: Features, params: Params) -> None:
    few = replace(features, x={"train": features.x["train"][:30]})
    heads = module._heads(few, params.linear, 6)
    assert heads.settings[0] == (0.1 * 30 / 256, 0)
    assert isinstance(heads.norm, torch.nn.Identity)
    of_norm = params.linear.model_copy(update={"batch_norm": True})
    assert isinstance(module._heads(few, of_norm, 6).norm, torch.nn.BatchNorm1d)


def heads_of(features: Features) -> LinearHeads:
    """Return four heads: the third is the best on val."""
    heads = LinearHeads(WIDTH, CLASSES, SETTINGS, False, torch.Generator().manual_seed(0))
    middle = np.stack([features.x["train"][features.y["train"] == c].mean(axis=0) for c in range(CLASSES)])
    with torch.no_grad():
        heads.weight.view(WIDTH, CLASSES, 4)[..., 2] = torch.from_numpy(middle.T)
    return heads


def test_outcome_is_of_the_head_that_val_chose_at_its_temperature(features: Features, params: Params) -> None:
    heads = heads_of(features)
    outcome = module._outcome(heads, features, params.linear, CPU)
    weight, bias = heads.head(2)
    of = {split: (features.x[split] @ weight.T + bias).astype(np.float64) for split in ("val", "test")}
    logits = Logits(of, features.y, features.ids)
    temperature = logits.temperature_on_val()
    expected = over_subsets([logits.scored(temperature)], len(features.y["train"]))
    assert {name: outcome.metrics[name] for name in expected.metrics} == pytest.approx(expected.metrics, abs=1e-3)
    assert outcome.predictions["prediction"].tolist() == expected.predictions["prediction"].tolist()
    assert outcome.predictions["id"].tolist() == features.ids["test"].tolist()
    assert {name: outcome.metrics[name] for name in ("base_lr", "weight_decay", "knn_k")} == {
        "base_lr": 1.0, "weight_decay": 0, "knn_k": 3,
    }  # fmt: skip
    kept = outcome.classifier
    assert kept is not None
    assert kept.head is not None
    assert (kept.head.pool, kept.head.blocks) == ("average", 2)
    assert kept.temperature == pytest.approx(temperature, rel=1e-5)
    assert np.allclose(kept.head.weight, weight / temperature, rtol=1e-5)


def test_knn_is_of_the_features_and_of_each_block(features: Features, params: Params) -> None:
    other = replace(features, x={split: -(x[:, ::-1].copy() ** 2) for split, x in features.x.items()})
    metrics = module._outcome(heads_of(features), other, params.linear, CPU).metrics

    def right(split: str, of: Any) -> np.ndarray:
        predicted = knn_predict(of["train"], features.y["train"], of[split], CLASSES, 3, 0.2)
        return predicted == features.y[split]

    for split in ("test", "val"):
        expected = accuracy_metrics(f"{split}/knn_top1", right(split, other.x)[None])
        assert {name: metrics[name] for name in expected} == expected
    blocks = [{split: of[block] for split, of in features.by_block.items()} for block in (0, 1)]
    assert [metrics[f"test/knn_top1_block{b}"] for b in (0, 1)] == [percent(right("test", of)) for of in blocks]
    alone = replace(features, by_block={split: of[:1] for split, of in features.by_block.items()})
    assert not any("block" in name for name in module._outcome(heads_of(features), alone, params.linear, CPU).metrics)


def test_knn_is_computed_on_the_device(features: Features, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "knn_predict", lambda *about: asked.append(about[-1]) or knn_predict(*about))  # type: ignore[func-returns-value]
    module._outcome(heads_of(features), features, params.linear, CPU)
    assert asked == [CPU] * 4  # test, val, and two blocks


def test_heads_that_all_diverged_are_refused(features: Features, params: Params) -> None:
    heads = heads_of(features)
    with torch.no_grad():
        heads.weight.fill_(torch.nan)
    with pytest.raises(LgpError, match="the weights of every head stopped being finite"):
        module._outcome(heads, features, params.linear, CPU)


def test_head_that_gets_no_image_right_is_still_a_head(features: Features, params: Params) -> None:
    heads = heads_of(features)
    wrong = replace(features, y={**features.y, "val": (heads.logits(features.x["val"], 0).argmax(1).numpy() + 5) % 10})
    heads.weight.data = heads.weight.view(-1, 4)[:, :1].repeat(1, 4).view(WIDTH, -1).data
    assert module._outcome(heads, wrong, params.linear, CPU).metrics["val/top1"] == 0


def test_plain_loss_of_the_heads_is_the_sum_over_heads(features: Features) -> None:
    heads = LinearHeads(WIDTH, CLASSES, [(0.5, 0.0), (0.25, 0.0)], False, torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(features.x["val"]), torch.from_numpy(features.y["val"])
    logits = heads(x)
    expected = F.cross_entropy(logits[..., 0], y) + 0.5 * F.cross_entropy(logits[..., 1], y)
    assert heads.loss(x, y).item() == pytest.approx(expected.item())
