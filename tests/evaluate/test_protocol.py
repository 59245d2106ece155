"""The label-efficiency protocol: what chooses hyperparameters, and what never does."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from lgp.data.prepared import Prepared
from lgp.evaluate.features import Features, pixels, standardizer
from lgp.evaluate.protocol import _fit_fewshot, evaluate_fewshot, evaluate_linear
from lgp.params import FewShotParams, LinearParams, Params


@pytest.fixture(scope="module")
def features(prepared: Prepared) -> Features:
    return Features.of(pixels, prepared)


@pytest.fixture
def linear(params: Params) -> LinearParams:
    return params.linear


@pytest.fixture
def fewshot(params: Params) -> FewShotParams:
    return params.fewshot


def test_features_are_standardised_by_the_training_part(features: Features) -> None:
    assert np.allclose(features.x["train"].mean(axis=0), 0, atol=1e-4)
    deviation = features.x["train"].std(axis=0)
    assert np.allclose(deviation[deviation > 0.1], 1, atol=1e-3)
    assert np.isfinite(features.x["test"]).all()


def test_constant_features_do_not_divide_by_zero() -> None:
    assert standardizer(np.ones((5, 2)))(np.ones((3, 2))).tolist() == [[0, 0]] * 3


def test_linear_probe_is_scikit_learns_with_c_chosen_on_val(features: Features, linear: LinearParams) -> None:
    metrics = evaluate_linear(features, linear).metrics
    x, y = features.x, features.y
    val = {
        c: LogisticRegression(C=c, max_iter=5000).fit(x["train"], y["train"]).score(x["val"], y["val"])
        for c in linear.c_grid
    }
    best = max(val, key=lambda c: val[c])
    model = LogisticRegression(C=best, max_iter=5000).fit(x["train"], y["train"])
    assert metrics["c"] == best
    assert metrics["test/top1"] == pytest.approx(100 * model.score(x["test"], y["test"]), abs=1e-3)
    assert metrics["labels"] == len(y["train"])
    assert next(iter(metrics)) == "test/top1"


def test_single_image_classes_take_the_fixed_strength(
    features: Features, fewshot: FewShotParams, prepared: Prepared
) -> None:
    subsets = prepared.subsets("1pct")
    outcome = evaluate_fewshot(features, subsets, fewshot)
    scores = []
    for ids in subsets:
        rows = np.searchsorted(features.ids["train"], ids)
        model = LogisticRegression(C=fewshot.c_single, max_iter=5000, tol=1e-6)
        model.fit(features.x["train"][rows].astype(np.float64), features.y["train"][rows])
        scores.append(100 * model.score(features.x["test"], features.y["test"]))
    assert outcome.metrics["c"] == fewshot.c_single
    assert outcome.metrics["test/top1"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert outcome.metrics["test/top1_std"] == pytest.approx(np.std(scores, ddof=1), abs=1e-3)
    assert [outcome.metrics[f"test/top1_subset{i}"] for i in range(5)] == pytest.approx(scores, abs=1e-3)


def test_more_images_a_class_are_cross_validated_within_the_labelled(
    features: Features, fewshot: FewShotParams, prepared: Prepared
) -> None:
    ids = prepared.subsets("10pct")[0]
    rows = np.searchsorted(features.ids["train"], ids)
    x, y = features.x["train"][rows].astype(np.float64), features.y["train"][rows]
    folds = StratifiedKFold(min(fewshot.folds, np.bincount(y).min()))
    search = GridSearchCV(LogisticRegression(max_iter=5000, tol=1e-6), {"C": fewshot.c_grid}, cv=folds).fit(x, y)
    metrics = evaluate_fewshot(features, [ids, ids], fewshot).metrics
    assert metrics["c"] == search.best_params_["C"]
    assert metrics["test/top1"] == pytest.approx(100 * search.score(features.x["test"], features.y["test"]), abs=1e-3)


def test_rotation_for_many_features_changes_no_prediction(fewshot: FewShotParams) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 10)
    x = rng.normal(size=(40, 300)) + y[:, None] * 0.1
    queries = rng.normal(size=(500, 300))
    model, c = _fit_fewshot(x, y, fewshot)
    plain = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x, y)
    assert np.mean(model.predict(queries) == plain.predict(queries)) > 0.99
    assert np.allclose(model.predict_proba(queries), plain.predict_proba(queries), atol=2e-2)


def test_shuffling_test_labels_changes_no_choice(
    features: Features, linear: LinearParams, fewshot: FewShotParams, prepared: Prepared
) -> None:
    shuffled = replace(features, y=features.y | {"test": np.random.default_rng(0).permutation(features.y["test"])})

    def choices(of: Features) -> list[Any]:
        outcomes = [evaluate_linear(of, linear), evaluate_fewshot(of, prepared.subsets("10pct"), fewshot)]
        return [o.metrics["c"] for o in outcomes] + [o.predictions["prediction"].tolist() for o in outcomes]

    assert choices(features) == choices(shuffled)
    assert (
        evaluate_linear(features, linear).metrics["test/top1"]
        > 2 * evaluate_linear(shuffled, linear).metrics["test/top1"]
    )


def test_predictions_give_the_metric_back(features: Features, fewshot: FewShotParams, prepared: Prepared) -> None:
    outcome = evaluate_fewshot(features, prepared.subsets("10pct"), fewshot)
    table = outcome.predictions
    accuracy = (table["label"] == table["prediction"]).groupby(table["subset"]).mean() * 100
    assert accuracy.tolist() == pytest.approx([outcome.metrics[f"test/top1_subset{i}"] for i in range(5)], abs=1e-3)
    assert set(table["id"]) == set(prepared.ids("test"))
