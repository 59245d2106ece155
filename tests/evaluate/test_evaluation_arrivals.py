"""What arrives in each evaluation: images, labels, weights and rates; and which images fit, choose and score."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from arrivals import INTERPOLATIONS, Arrivals, Coloured, Slow, arriving, same
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from lgp.compute.randomness import Stream
from lgp.evaluate import linear
from lgp.evaluate.few_labels import evaluate_fewshot
from lgp.evaluate.fine_tuning import finetune
from lgp.evaluate.linear import evaluate_linear, evaluate_linear_augmented
from lgp.evaluate.outcome import Outcome
from lgp.features.cache import FeatureCache, Features
from lgp.features.extraction import ALONE
from lgp.features.of_encoder import encoder_source, live_features_of
from lgp.models.encoder_folder import load_encoder
from lgp.params.evaluate import FeatureParams, FewShotParams
from lgp.params.pretrain import ViewParams

CPU = torch.device("cpu")
RECIPE = {
    "epochs": 3, "batch_size": 12, "base_lr": 0.5, "warmup_epochs": 1, "weight_decay": 0.06, "layer_decay": 0.5,
    "drop_path": 0, "label_smoothing": 0, "crop_scale_min": 0.4, "flip_p": 0.5,
}  # fmt: skip
STEPS, WARMUP, PEAK = 9, 3, 0.5 * 12 / 256  # 39 labels are three batches of 12


def ids_in(coloured: Coloured, part: str) -> np.ndarray:
    """Return the labelled images of a part."""
    labelled = np.array([not path.startswith("unlabeled/") for path in coloured.data.paths])
    return np.flatnonzero((coloured.data.index["part"] == part) & labelled)


def labels_of(coloured: Coloured, ids: Any) -> np.ndarray:
    """Return the labels of images by the names of their folders."""
    return np.array(["abc".index(coloured.data.paths[i].split("/")[1]) for i in ids])


def tuned(
    coloured: Coloured, folder: Path, labels: str = "all", most: int | None = None, **changes: Any
) -> tuple[list[Arrivals], Outcome | None]:
    """Fine-tune the first encoder on two subsets, or with all labels."""
    session, outcome = coloured.session({"finetune": {"10pct": RECIPE | changes}}, folder), None
    with arriving(most) as trainings:
        subsets = coloured.data.labelled(labels)[:2]
        recipe = session.params.recipe("10pct")
        outcome = finetune(coloured.mim.parent, coloured.data, subsets, recipe, session)
    return trainings, outcome


def slow(coloured: Coloured, ids: np.ndarray, name: str, batch_size: int = 12) -> Slow:
    """Return the batches of an evaluation, made image by image."""
    views, stream = ViewParams(crop_scale_min=0.4, flip_p=0.5), Stream(coloured.values["seed"], name)
    return Slow(coloured.data, ids, views, 1, batch_size, stream, INTERPOLATIONS[name.split("/")[0]])


@pytest.fixture(scope="module")
def whole(coloured: Coloured, tmp_path_factory: pytest.TempPathFactory) -> tuple[Arrivals, Outcome]:
    """A fine-tuning with all labels and no augmentation but crops and flips."""
    (arrivals,), outcome = tuned(coloured, tmp_path_factory.mktemp("whole"))
    assert outcome is not None
    return arrivals, outcome


# fine-tuning


def test_fine_tuning_gets_the_normalised_crops_of_the_labelled_images(
    whole: tuple[Arrivals, Outcome], coloured: Coloured
) -> None:
    arrivals, batches = whole[0], slow(coloured, ids_in(coloured, "train"), "finetune/0")
    assert len(arrivals.steps) == STEPS
    for step in (0, 1, STEPS - 1):
        (images,) = arrivals.steps[step].inputs["patch_embed"]
        assert same(images, batches.normalized(batches.crops(step, 0)))
        assert arrivals.steps[step].training


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_fine_tuning_gets_the_labels_of_its_images(smoothing: float, coloured: Coloured, tmp_path: Path) -> None:
    (arrivals,), _ = tuned(coloured, tmp_path, most=5, label_smoothing=smoothing)
    batches = slow(coloured, ids_in(coloured, "train"), "finetune/0")
    for number, step in enumerate(arrivals.steps):
        labels = F.one_hot(torch.from_numpy(labels_of(coloured, batches.ids_of(number))), 3).float()
        soft = labels * (1 - smoothing) + smoothing / 3
        expected = -(step.outputs[""][0].log_softmax(1) * soft).sum(1).mean()
        assert step.loss == pytest.approx(expected.item(), rel=1e-5)


def test_each_subset_is_fitted_alone_and_from_the_arms_weights(coloured: Coloured, tmp_path: Path) -> None:
    trainings, outcome = tuned(coloured, tmp_path, "4shot")
    start = load_encoder(coloured.mim).state_dict()
    subsets = coloured.data.subsets("4shot")
    assert len(trainings) == 2
    for number, arrivals in enumerate(trainings):
        batches = slow(coloured, subsets[number], f"finetune/{number}")
        assert same(arrivals.steps[1].inputs["patch_embed"][0], batches.normalized(batches.crops(1, 0)))
        assert all(torch.equal(arrivals.start[name], tensor) for name, tensor in start.items())
    heads = [arrivals.start["head.weight"] for arrivals in trainings]
    assert not torch.equal(*heads)
    assert all(1e-5 < head.std() < 3e-5 for head in heads)
    assert outcome is not None
    assert outcome.metrics["labels"] == 12


def test_fine_tuning_scores_whole_images_of_val_and_test(whole: tuple[Arrivals, Outcome], coloured: Coloured) -> None:
    arrivals, outcome = whole
    of_parts = [ids_in(coloured, part) for part in ("val", "test")]
    for ids, arrived in zip(of_parts, arrivals.after["patch_embed"], strict=True):
        pixels = np.stack([np.asarray(coloured.data.open_image(i)) for i in ids])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        assert torch.allclose(arrived, slow(coloured, ids, "x").normalized(images), atol=1e-4)
    assert outcome.predictions["id"].tolist() == of_parts[1].tolist()
    assert outcome.predictions["label"].tolist() == labels_of(coloured, of_parts[1]).tolist()
    assert not arrivals.model.training


def test_fine_tuning_rates_decay_by_layer_and_follow_warm_up_and_cosine(whole: tuple[Arrivals, Outcome]) -> None:
    arrivals = whole[0]

    def layer(name: str) -> int:
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else {"norm": 3, "head": 4}.get(name[:4], 0)

    last = (1 + math.cos(math.pi * (STEPS - 1 - WARMUP) / (STEPS - WARMUP))) / 2
    names = [name for name, _ in arrivals.model.named_parameters()]
    for step, share in ((0, 0), (1, 1 / WARMUP), (WARMUP, 1), (STEPS - 1, last)):
        expected = {name: share * PEAK * 0.5 ** (4 - layer(name)) for name in names}
        assert arrivals.steps[step].rates == pytest.approx(expected)


def test_fine_tuning_decays_matrices_alone_with_the_papers_betas(whole: tuple[Arrivals, Outcome]) -> None:
    arrivals = whole[0]
    undecayed = {name for name, p in arrivals.model.named_parameters() if p.ndim == 1} | {"cls_token", "pos_embed"}
    decays = {name: 0.0 if name in undecayed else 0.06 for name, _ in arrivals.model.named_parameters()}
    assert arrivals.grouped("weight_decay") == decays
    assert set(arrivals.grouped("betas").values()) == {(0.9, 0.999)}


def test_drop_path_grows_with_the_depth(coloured: Coloured, tmp_path: Path) -> None:
    (arrivals,), _ = tuned(coloured, tmp_path, most=1, drop_path=0.2)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in arrivals.model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


def test_rand_augment_is_timms_on_each_crop(coloured: Coloured, tmp_path: Path) -> None:
    description = "rand-m9-mstd0.5-inc1"
    (arrivals,), _ = tuned(coloured, tmp_path, most=2, rand_augment=description)
    batches = slow(coloured, ids_in(coloured, "train"), "finetune/0")
    colour = tuple(round(255 * mean) for mean in coloured.data.mean)
    about = {"img_mean": colour, "translate_const": round(0.45 * 8), "interpolation": Image.Resampling.BICUBIC}
    augment = rand_augment_transform(description, about)
    crops = (batches.crops(1, 0) * 255).byte().permute(0, 2, 3, 1).numpy()
    augmented = []
    for row, crop in enumerate(crops):
        with batches.stream.seeded("rand_augment", 1, row):
            augmented.append(np.asarray(augment(Image.fromarray(crop))))
    assert sum(bool((a != c).any()) for a, c in zip(augmented, crops, strict=True)) > 6
    expected = batches.normalized(torch.from_numpy(np.stack(augmented)).permute(0, 3, 1, 2) / 255)
    # an operation like `Posterize` makes more of a level that was rounded otherwise
    found = arrivals.steps[1].inputs["patch_embed"][0]
    assert sum(same(a[None], b[None]) for a, b in zip(found, expected, strict=True)) >= 10


def test_random_erasing_replaces_a_rectangle_of_each_image(coloured: Coloured, tmp_path: Path) -> None:
    (arrivals,), _ = tuned(coloured, tmp_path, most=1, random_erasing=1.0)
    batches = slow(coloured, ids_in(coloured, "train"), "finetune/0")
    found, expected = arrivals.steps[0].inputs["patch_embed"][0], batches.normalized(batches.crops(0, 0))
    for changed in ((found - expected).abs() > 1 / 40).any(1):
        rows, columns = changed.any(1), changed.any(0)
        assert 1 <= changed.sum() < 32
        assert torch.equal(changed, rows[:, None] & columns)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_images_carry_their_labels_in_the_same_shares(
    smoothing: float, coloured: Coloured, tmp_path: Path
) -> None:
    (arrivals,), _ = tuned(coloured, tmp_path, most=4, mixup=0.8, label_smoothing=smoothing)
    batches = slow(coloured, ids_in(coloured, "train"), "finetune/0")
    shares = []
    for number, step in enumerate(arrivals.steps):
        images = batches.normalized(batches.crops(number, 0))
        partners = images.flip(0)
        way = images - partners
        share = ((step.inputs["patch_embed"][0] - partners) * way).sum() / way.square().sum()
        assert same(step.inputs["patch_embed"][0], share * images + (1 - share) * partners)
        labels = F.one_hot(torch.from_numpy(labels_of(coloured, batches.ids_of(number))), 3) * (1 - smoothing)
        labels = labels + smoothing / 3
        soft = share * labels + (1 - share) * labels.flip(0)
        expected = -(step.outputs[""][0].log_softmax(1) * soft).sum(1).mean()
        assert step.loss == pytest.approx(expected.item(), rel=1e-3)
        shares.append(share.item())
    assert max(shares) - min(shares) > 0.02


# features


@pytest.fixture(scope="module")
def features(coloured: Coloured, tmp_path_factory: pytest.TempPathFactory) -> Features:
    cache = FeatureCache(tmp_path_factory.mktemp("cache"), FeatureParams(), 1.0)
    return cache.features(encoder_source(coloured.mim, FeatureParams(), ALONE), coloured.data)


def test_features_are_timms_of_the_normalised_images_with_their_labels(features: Features, coloured: Coloured) -> None:
    encoder = timm.create_model(f"local-dir:{coloured.mim}", pretrained=True, num_classes=0).eval()
    for part in ("train", "val", "test"):
        ids = ids_in(coloured, part)
        pixels = np.stack([np.asarray(coloured.data.open_image(i)) for i in ids])
        images = slow(coloured, ids, "x").normalized(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
        with torch.inference_mode():
            assert np.allclose(features.x[part], encoder(images).numpy(), atol=1e-3)
        assert features.ids[part].tolist() == ids.tolist()
        assert features.y[part].tolist() == labels_of(coloured, ids).tolist()


# the linear probe


def test_sweep_fits_the_training_features_with_their_labels(
    features: Features, coloured: Coloured, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    train = linear.train_heads
    monkeypatch.setattr(linear, "train_heads", lambda *args: given.extend(args) or train(*args))
    params = coloured.params({"linear": {"epochs": 4, "batch_size": 16, "base_lrs": [0.1, 1], "batch_norm": False}})
    evaluate_linear(features, params.linear, 3, CPU, params.run)
    heads, x, y, epochs, batch_size, seed, precision = given
    assert np.array_equal(x, features.x["train"])
    assert y.tolist() == labels_of(coloured, ids_in(coloured, "train")).tolist()
    assert (epochs, batch_size, seed, precision) == (4, 16, 3, torch.float32)
    assert heads.settings == [(0.1 / 16, 0), (0.1 / 16, 1e-6), (1 / 16, 0), (1 / 16, 1e-6)]
    assert isinstance(heads.norm, torch.nn.Identity)


def test_validation_chooses_the_head_and_does_not_train_it(features: Features, coloured: Coloured) -> None:
    params = coloured.params({"linear": {"epochs": 20, "base_lrs": [1e-3, 3.0], "weight_decays": [0], "knn_k": 5}})

    def evaluated(val: np.ndarray, rates: list[float]) -> Outcome:
        of_rates = params.linear.model_copy(update={"base_lrs": rates})
        return evaluate_linear(replace(features, y={**features.y, "val": val}), of_rates, 0, CPU, params.run)

    right, wrong = features.y["val"], (features.y["val"] + 1) % 3
    alone = [evaluated(val, [3.0]).predictions for val in (right, wrong)]
    assert alone[0].equals(alone[1])
    of_head = {rate: evaluated(right, [rate]).metrics["val/top1"] for rate in (1e-3, 3.0)}
    both = evaluated(right, [1e-3, 3.0]).metrics
    assert both["val/top1"] == of_head[both["base_lr"]] == max(of_head.values())


def test_score_is_of_the_test_images(features: Features, coloured: Coloured) -> None:
    params = coloured.params({"linear": {"epochs": 20, "base_lrs": [1.0], "weight_decays": [0], "knn_k": 5}})
    outcome = evaluate_linear(features, params.linear, 0, CPU, params.run)
    table = outcome.predictions
    assert table["id"].tolist() == ids_in(coloured, "test").tolist()
    assert table["label"].tolist() == labels_of(coloured, table["id"]).tolist()
    assert outcome.metrics["test/top1"] == pytest.approx(100 * (table["label"] == table["prediction"]).mean(), abs=1e-3)


def test_augmented_probe_gets_normalised_crops_with_their_labels_at_a_cosines_rate(
    features: Features, coloured: Coloured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"method": "augmented", "crop_scale_min": 0.4, "flip_p": 0.5, "epochs": 3, "batch_size": 12}
    session = coloured.session({"linear": changes | {"base_lrs": [0.3], "weight_decays": [0]}}, tmp_path)
    encode, arrived = live_features_of(coloured.mim, FeatureParams(), CPU), []

    def watched(images: Tensor) -> Tensor:
        arrived.append(images.clone())
        return encode(images)

    monkeypatch.setattr(linear, "live_features_of", lambda *_about: watched)
    with arriving() as trainings:
        evaluate_linear_augmented(features, coloured.mim, coloured.data, session, CPU)
    steps, batches = trainings[0].steps, slow(coloured, ids_in(coloured, "train"), "linear")
    assert len(arrived) == len(steps) == STEPS
    for number in (0, 1, STEPS - 1):
        assert same(arrived[number], batches.normalized(batches.crops(number, 0)))
        labels = torch.from_numpy(labels_of(coloured, batches.ids_of(number)))
        expected = F.cross_entropy(steps[number].outputs[""][0][..., 0], labels)
        assert steps[number].loss == pytest.approx(expected.item(), rel=1e-5)
        rate = 0.3 * 12 / 256 * (1 + math.cos(math.pi * number / STEPS)) / 2
        assert steps[number].rates == pytest.approx({"weight": rate, "bias": rate})


# few labels


def with_noise_for(features: Features, split: str, rows: np.ndarray) -> Features:
    """Replace the features of some images of a split by noise, and their labels by the next class."""
    x, y = features.x[split].copy(), features.y[split].copy()
    x[rows] = np.random.default_rng(0).normal(size=x[rows].shape)
    y[rows] = (y[rows] + 1) % 3
    return replace(features, x={**features.x, split: x}, y={**features.y, split: y})


def few(features: Features, subsets: list[np.ndarray], **changes: Any) -> Outcome:
    settings = {"scaling": "normalized", "choose": "cross_validation", "c_grid": [0.1, 10, 1000], "c_fixed": 1}
    return evaluate_fewshot(features, subsets, FewShotParams.model_validate({**settings, "folds": 2, **changes}))


@pytest.mark.parametrize("choose", ["cross_validation", "validation", "fixed"])
def test_few_labels_are_fitted_on_the_subset_alone(choose: str, features: Features, coloured: Coloured) -> None:
    subset = coloured.data.subsets("4shot")[0]
    others = np.flatnonzero(~np.isin(features.ids["train"], subset))
    outcomes = [few(f, [subset, subset], choose=choose) for f in (features, with_noise_for(features, "train", others))]
    assert outcomes[0].predictions.equals(outcomes[1].predictions)
    within = with_noise_for(features, "train", np.flatnonzero(np.isin(features.ids["train"], subset)))
    assert not outcomes[0].predictions.equals(few(within, [subset, subset], choose=choose).predictions)


@pytest.mark.parametrize("choose", ["cross_validation", "fixed"])
def test_validation_has_no_part_in_few_labels_unless_it_chooses(
    choose: str, features: Features, coloured: Coloured
) -> None:
    subset = coloured.data.subsets("4shot")[0]
    noise = with_noise_for(features, "val", np.arange(len(features.y["val"])))
    outcomes = [few(f, [subset, subset], choose=choose) for f in (features, noise)]
    assert outcomes[0].predictions.equals(outcomes[1].predictions)
    assert outcomes[0].metrics["c"] == outcomes[1].metrics["c"]


def test_few_label_scores_are_of_the_test_images(features: Features, coloured: Coloured) -> None:
    subsets = coloured.data.subsets("4shot")
    outcome = few(features, subsets)
    for number, of_subset in outcome.predictions.groupby("subset"):
        assert of_subset["id"].tolist() == ids_in(coloured, "test").tolist()
        assert of_subset["label"].tolist() == labels_of(coloured, of_subset["id"]).tolist()
        right = 100 * (of_subset["label"] == of_subset["prediction"]).mean()
        assert outcome.metrics[f"test/top1_subset{number}"] == pytest.approx(right, abs=1e-3)
    assert len({tuple(of_subset["prediction"]) for _, of_subset in outcome.predictions.groupby("subset")}) > 1
