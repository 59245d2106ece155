"""Few labels: the classifiers are scikit-learn's, and what chooses their strength."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.evaluate import few_labels, logistic
from lgp.evaluate.calibration import fit_temperature
from lgp.evaluate.few_labels import Fitted, Images, evaluate_fewshot, evaluate_propagation, fit_few_labels
from lgp.features.cache import FeatureCache, Features, normalizer, pixel_source, standardizer
from lgp.params.evaluate import FeatureParams, FewShotParams, PropagationParams
from lgp.params.file import Params


@pytest.fixture(scope="module")
def features(prepared: LabelledImages, tmp_path_factory: pytest.TempPathFactory) -> Features:
    return FeatureCache(tmp_path_factory.mktemp("cache"), FeatureParams(), 1.0).features(pixel_source(), prepared)


@pytest.fixture
def fewshot(params: Params) -> FewShotParams:
    return params.fewshot


def changed(params: FewShotParams, **changes: Any) -> FewShotParams:
    return FewShotParams.model_validate(params.model_dump() | changes)


CPU = torch.device("cpu")


def scaled(features: Features, scaling: Any = standardizer) -> dict[str, np.ndarray]:
    scale = scaling(features.x["train"])
    return {split: scale(x).astype(np.float64) for split, x in features.x.items()}


def fitted(x: np.ndarray, y: np.ndarray, params: FewShotParams, classes: int | None = None) -> Fitted:
    (found,) = fit_few_labels([Images(x, y)], None, classes or int(y.max()) + 1, params)
    return found


def rows(features: Features, ids: np.ndarray) -> np.ndarray:
    return np.searchsorted(features.ids["train"], ids)


@pytest.mark.parametrize(("scaling", "scale"), [("standardized", standardizer), ("normalized", normalizer)])
def test_single_image_classes_take_the_fixed_strength(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages, scaling: str, scale: Any
) -> None:
    subsets = prepared.subsets("1pct")
    outcome = evaluate_fewshot(features, subsets, changed(fewshot, scaling=scaling))
    x, scores = scaled(features, scale), []
    for ids in subsets:
        few = rows(features, ids)
        model = LogisticRegression(C=fewshot.c_fixed, max_iter=5000, tol=1e-8)
        model.fit(x["train"][few], features.y["train"][few])
        scores.append(100 * model.score(x["test"], features.y["test"]))
    assert outcome.metrics["c"] == fewshot.c_fixed
    assert [outcome.metrics[f"test/top1_subset{i}"] for i in range(5)] == pytest.approx(scores, abs=1e-3)


def test_scaling_is_measured_on_images_without_a_label_too(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    unlabelled = 5 + 3 * features.x["test"][:40]
    more = replace(features, x={**features.x, "unlabeled": unlabelled})
    ids = prepared.subsets("1pct")[0]
    scale = standardizer(np.concatenate([features.x["train"], unlabelled]))
    few, x_test = rows(features, ids), scale(features.x["test"])
    model = LogisticRegression(C=fewshot.c_fixed, max_iter=5000, tol=1e-8)
    model.fit(scale(features.x["train"][few]).astype(np.float64), features.y["train"][few])
    found = evaluate_fewshot(more, [ids, ids], fewshot).predictions.query("subset == 0").sort_values("id")
    expected = dict(zip(features.ids["test"].tolist(), model.predict(x_test.astype(np.float64)), strict=True))
    assert found["prediction"].tolist() == [expected[i] for i in found["id"]]


def test_more_images_a_class_are_cross_validated_within_the_labelled(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    ids = prepared.subsets("10pct")[0]
    x, few = scaled(features), rows(features, ids)
    y = features.y["train"][few]
    folds = StratifiedKFold(min(fewshot.folds, np.bincount(y).min()))
    search = GridSearchCV(LogisticRegression(max_iter=5000, tol=1e-8), {"C": fewshot.c_grid}, cv=folds)
    search.fit(x["train"][few], y)
    metrics = evaluate_fewshot(features, [ids, ids], fewshot).metrics
    assert metrics["c"] == search.best_params_["C"]
    assert metrics["test/top1"] == pytest.approx(100 * search.score(x["test"], features.y["test"]), abs=1e-3)


def test_strength_by_validation_is_the_best_on_val(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    ids = prepared.subsets("10pct")[0]
    x, few = scaled(features), rows(features, ids)
    val = {}
    for c in fewshot.c_grid:
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x["train"][few], features.y["train"][few])
        val[c] = model.score(x["val"], features.y["val"])
    metrics = evaluate_fewshot(features, [ids, ids], changed(fewshot, choose="validation")).metrics
    assert metrics["c"] == max(val, key=lambda c: val[c])
    assert metrics["val/top1"] == pytest.approx(100 * max(val.values()), abs=1e-3)


def test_papers_strength_minimises_the_papers_objective(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    """λ = 0.00025 / N of (1/N) Σ loss + λ/2 · |w|² is scikit-learn's C = 1 / (N λ) = 4000."""
    few = rows(features, prepared.subsets("10pct")[0])
    x, y = scaled(features, normalizer)["train"][few], features.y["train"][few]
    found = fitted(x, y, changed(fewshot, choose="fixed", c_fixed=4000))
    assert found.c == 4000
    images, lam = len(x), 0.00025 / len(x)

    def objective(weights: np.ndarray, intercept: np.ndarray) -> float:
        logits = x @ weights.T + intercept
        loss = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1) - logits[range(images), y]
        return float(loss.mean() + lam / 2 * (weights**2).sum())

    head, rng = found.head, np.random.default_rng(0)
    least = objective(head.weight, head.bias)
    for _ in range(50):
        step = 1e-2 * rng.normal(size=head.weight.shape)
        assert objective(head.weight + step, head.bias) > least


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("width", [20, 300])
def test_classifier_of_a_subset_is_scikit_learns(fewshot: FewShotParams, width: int, intercept: bool) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 10)
    x = rng.normal(size=(40, width)) + 1 + y[:, None] * 0.1
    queries = rng.normal(size=(500, width)) + 1
    found = fitted(x, y, changed(fewshot, intercept=intercept))
    plain = LogisticRegression(C=found.c, fit_intercept=intercept, max_iter=5000, tol=1e-10).fit(x, y)
    assert found.head.bias.any() == intercept
    assert np.abs(softmax(found.head.logits(queries), axis=1) - plain.predict_proba(queries)).max() < 1e-4


def test_ridge_is_searched_and_calibrated_as_logistic_regression(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    """Its C is the inverse of scikit-learn's α, the accuracy in folds chooses it, and they give the temperature."""
    ids = prepared.ids("train")[:120]
    x, few = scaled(features), rows(features, ids)
    x_few, y = x["train"][few], features.y["train"][few]
    targets, folds = np.eye(10)[y], list(StratifiedKFold(5).split(x_few, y))

    def model(c: float, of: np.ndarray) -> Ridge:
        return Ridge(alpha=1 / c).fit(x_few[of], targets[of])

    scores = [
        np.mean([(model(c, rest).predict(x_few[out]).argmax(1) == y[out]).mean() for rest, out in folds])
        for c in fewshot.c_grid
    ]
    c = fewshot.c_grid[int(np.argmax(scores))]
    metrics = evaluate_fewshot(features, [ids, ids], changed(fewshot, method="ridge")).metrics
    predicted = model(c, np.arange(len(y))).predict(x["test"]).argmax(1)
    assert metrics["c"] == c
    assert metrics["test/top1"] == pytest.approx(100 * (predicted == features.y["test"]).mean(), abs=1e-3)
    assert metrics["unconverged"] == 0
    logits = np.empty((len(y), 10))
    for rest, out in folds:
        logits[out] = model(c, rest).predict(x_few[out])
    assert metrics["temperature"] == pytest.approx(fit_temperature(logits, y).value, abs=1e-4)
    assert metrics["temperature"] < 0.5
    assert metrics["test/ece"] < metrics["test/ece_uncalibrated"] / 2


def test_regressions_that_do_not_converge_are_counted(
    features: Features,
    fewshot: FewShotParams,
    prepared: LabelledImages,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    subsets = prepared.subsets("10pct")[:2]
    assert evaluate_fewshot(features, subsets, fewshot).metrics["unconverged"] == 0
    for module in (few_labels, logistic):
        monkeypatch.setattr(module, "MAX_ITER", 1)
    for choose in ("cross_validation", "fixed"):
        assert evaluate_fewshot(features, subsets, changed(fewshot, choose=choose)).metrics["unconverged"] == 2
    assert "warning: 2 of 2 regressions stopped after 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize("choose", ["cross_validation", "validation"])
def test_shuffling_test_labels_changes_no_choice(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages, choose: str
) -> None:
    shuffled = replace(features, y={**features.y, "test": np.random.default_rng(0).permutation(features.y["test"])})
    outcomes = [
        evaluate_fewshot(of, prepared.subsets("10pct"), changed(fewshot, choose=choose)) for of in (features, shuffled)
    ]
    assert outcomes[0].metrics["c"] == outcomes[1].metrics["c"]
    assert outcomes[0].metrics["val/top1"] == outcomes[1].metrics["val/top1"]
    assert outcomes[0].predictions["prediction"].tolist() == outcomes[1].predictions["prediction"].tolist()
    assert outcomes[0].metrics["test/top1"] > 2 * outcomes[1].metrics["test/top1"]


def test_class_without_a_labelled_image_gets_no_probability(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    ids = np.array([i for i in prepared.subsets("10pct")[0] if prepared.labels[i] != 4])
    predictions = evaluate_fewshot(features, [ids, ids], fewshot).predictions
    assert 4 not in set(predictions["prediction"])


def test_subset_of_one_class_is_refused(features: Features, fewshot: FewShotParams, prepared: LabelledImages) -> None:
    ids = prepared.ids("train")
    fours = ids[prepared.labels[ids] == 4][:3]
    for evaluate in (
        lambda: evaluate_fewshot(features, [fours], fewshot),
        lambda: evaluate_propagation(features, [fours], fewshot, PropagationParams(), CPU),
    ):
        with pytest.raises(LgpError, match="subset of 3 images has one class alone"):
            evaluate()


def test_graph_has_the_training_images_labelled_or_not_and_no_other(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[np.ndarray] = []
    find = few_labels.find_neighbours
    monkeypatch.setattr(few_labels, "find_neighbours", lambda x, *more: graphs.append(x) or find(x, *more))
    unlabeled = {"x": features.x["test"][:7], "ids": features.ids["test"][:7]}  # stand for images without a label
    more = replace(
        features,
        x={**features.x, "unlabeled": unlabeled["x"]},
        ids={**features.ids, "unlabeled": unlabeled["ids"]},
    )
    subsets = prepared.subsets("10pct")[:1]
    outcome = evaluate_propagation(more, subsets, fewshot, PropagationParams(), CPU)
    scale = standardizer(features.x["train"], unlabeled["x"])
    assert np.array_equal(graphs[0], scale(np.concatenate([features.x["train"], unlabeled["x"]])))
    assert outcome.metrics["unlabelled"] == len(features.x["train"]) + 7 - len(subsets[0])


def test_propagation_sees_the_labels_of_its_subset_only(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    """Labels of other training images, and those of test, change no prediction."""
    subsets = prepared.subsets("1pct")[:2]
    rng, kept = np.random.default_rng(0), np.searchsorted(features.ids["train"], np.concatenate(subsets))
    y = {split: rng.permutation(features.y[split]) for split in ("train", "test")}
    y["train"][kept] = features.y["train"][kept]
    one, other = (
        evaluate_propagation(of, subsets, fewshot, PropagationParams(), CPU)
        for of in (features, replace(features, y={**features.y, **y}))
    )
    assert one.predictions["prediction"].tolist() == other.predictions["prediction"].tolist()
    assert one.metrics["test/top1"] > 2 * other.metrics["test/top1"]


def test_kept_classifier_gives_the_predictions_of_its_subset(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    for evaluate in (
        lambda subsets: evaluate_fewshot(features, subsets, fewshot),
        lambda subsets: evaluate_propagation(features, subsets, fewshot, PropagationParams(), CPU),
    ):
        outcome = evaluate(prepared.subsets("10pct")[:3])
        assert outcome.classifier is not None
        assert outcome.classifier.head is not None
        logits = outcome.classifier.head.logits(np.asarray(features.x["test"], dtype=np.float64))
        of_subsets = [table for _, table in outcome.predictions.groupby("subset")]
        same = [bool((table["prediction"].to_numpy() == logits.argmax(1)).all()) for table in of_subsets]
        assert any(same)
        kept = of_subsets[same.index(True)]
        assert np.abs(kept["confidence"] - softmax(logits, axis=1).max(1)).max() < 1e-5


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 2], [1, 2, 3]])
@pytest.mark.parametrize("width", [3, 60])
def test_head_has_the_probabilities_of_scikit_learn(fewshot: FewShotParams, classes: list[int], width: int) -> None:
    """Also of two classes, of more features than images, and where a class has no image."""
    rng = np.random.default_rng(0)
    y = np.repeat(classes, 6)
    x, queries = rng.normal(size=(len(y), width)) + y[:, None], rng.normal(size=(9, width))
    found = fitted(x, y, changed(fewshot, choose="fixed"), classes=4)
    probabilities = softmax(found.head.logits(queries), axis=1)
    model = LogisticRegression(C=found.c, max_iter=5000, tol=1e-10).fit(x, y)
    assert np.abs(probabilities[:, classes] - model.predict_proba(queries)).max() < 1e-5
    assert np.allclose(probabilities.sum(1), 1)


def test_classifier_of_the_subset_that_is_best_on_val_is_kept(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    subsets = prepared.subsets("1pct")
    on_val = [evaluate_fewshot(features, [subset], fewshot).metrics["val/top1"] for subset in subsets]
    worst_first = [subsets[i] for i in np.argsort(on_val)]
    kept = evaluate_fewshot(features, worst_first, fewshot).classifier
    assert kept is not None
    assert kept.head is not None
    right = kept.head.logits(np.asarray(features.x["val"], dtype=np.float64)).argmax(1) == features.y["val"]
    assert min(on_val) < max(on_val)
    assert 100 * right.mean() == pytest.approx(max(on_val), abs=1e-3)


def test_temperature_is_found_within_the_labelled_images_or_on_val(
    features: Features, fewshot: FewShotParams, prepared: LabelledImages
) -> None:
    """On val if that chooses the strength too, or if a class has a single labelled image."""
    wrong = (features.y["val"] + (np.arange(len(features.y["val"])) % 4 == 0)) % features.classes
    y = {**features.y, "val": wrong}

    def moved_by_val(labels: str, choose: str) -> bool:
        subsets, params = prepared.subsets(labels)[:1], changed(fewshot, choose=choose)
        one, other = (evaluate_fewshot(f, subsets, params) for f in (features, replace(features, y=y)))
        return one.metrics["temperature"] != other.metrics["temperature"]

    assert not moved_by_val("10pct", "cross_validation")
    assert moved_by_val("10pct", "validation")
    assert moved_by_val("1pct", "cross_validation")
