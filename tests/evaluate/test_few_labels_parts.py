"""What few-label evaluation asks of its parts, on random features: scaling, folds, temperature, what is kept."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from lgp.evaluate import few_labels as module
from lgp.evaluate.calibration import fit_temperature
from lgp.evaluate.few_labels import evaluate_fewshot, evaluate_propagation, fit_logistic_regression
from lgp.evaluate.outcome import Outcome
from lgp.evaluate.propagation import UNKNOWN, ChosenPropagation, choose_propagation
from lgp.features.cache import Features, normalizer, standardizer
from lgp.models.classifier_folder import Head
from lgp.params.evaluate import FeatureParams, FewShotParams, PropagationParams

CPU, CLASSES, WIDTH = torch.device("cpu"), 3, 5
SIZES = {"train": 60, "unlabeled": 12, "val": 45, "test": 30}
SETTINGS = {"scaling": "standardized", "choose": "cross_validation", "c_grid": [0.01, 1, 100], "c_fixed": 7, "folds": 3}


def fewshot(**changes: Any) -> FewShotParams:
    return FewShotParams.model_validate(SETTINGS | changes)


@pytest.fixture
def features() -> Features:
    """Classes that overlap; ids count by tens, so that no id is a row."""
    rng, x, y, ids = np.random.default_rng(0), {}, {}, {}
    for number, (split, size) in enumerate(SIZES.items()):
        y[split] = np.arange(size) % CLASSES
        x[split] = (3 + rng.normal(0, 2, (size, WIDTH)) + 2 * np.eye(CLASSES, WIDTH)[y[split]]).astype(np.float32)
        ids[split] = 10 * np.arange(size) + 1000 * number
    y["unlabeled"] = np.full(SIZES["unlabeled"], -1)
    return Features(x, y, ids, CLASSES, {}, FeatureParams(pool="average", blocks=2))


def subset(features: Features, *rows: int) -> np.ndarray:
    return features.ids["train"][list(rows)]


FEW, MORE = range(24), range(10, 52)


def test_temperature_is_of_logits_that_each_fold_left_out(features: Features) -> None:
    params = fewshot(choose="cross_validation")
    x = standardizer(features.x["train"], features.x["unlabeled"])(features.x["train"])[:42].astype(np.float64)
    y = features.y["train"][:42]
    logits = np.empty((42, CLASSES))
    for rest, left_out in StratifiedKFold(3).split(x, y):
        model = LogisticRegression(C=0.5, max_iter=5000, tol=1e-6).fit(x[rest], y[rest])
        logits[left_out] = model.decision_function(x[left_out])
    expected = fit_temperature(logits, y)
    assert not expected.at_bound
    assert module._temperature(x, y, 0.5, CLASSES, params) == pytest.approx(expected.value, abs=1e-4)


@pytest.mark.parametrize(
    ("images", "changes", "found"),
    [
        (18, {}, False),  # fewer than 20
        (21, {}, True),
        (21, {"choose": "validation"}, False),
        (21, {"choose": "fixed"}, True),
        (21, {"folds": 2}, True),
    ],
)
def test_temperature_within_the_labels_needs_enough_of_them(
    images: int, changes: dict[str, Any], found: bool, features: Features
) -> None:
    x, y = features.x["train"][:images], features.y["train"][:images]
    assert (module._temperature(x, y, 1.0, CLASSES, fewshot(**changes)) is not None) is found
    alone = np.append(y[y != 2], 2)  # one image of a class
    assert module._temperature(features.x["train"][: len(alone)], alone, 1.0, CLASSES, fewshot(**changes)) is None


def test_twenty_images_are_enough_for_a_temperature(features: Features) -> None:
    y = features.y["train"][:20]
    assert module._temperature(features.x["train"][:20], y, 1.0, CLASSES, fewshot()) is not None


def test_folds_are_no_more_than_the_images_of_the_rarest_class() -> None:
    assert module._folds(np.array([0] * 9 + [4] * 2), fewshot()) == 2
    assert module._folds(np.array([0] * 9 + [4] * 5), fewshot()) == 3
    assert module._folds(np.array([1, 1, 2]), fewshot()) == 1


def test_two_images_a_class_are_cross_validated_in_two_folds(features: Features) -> None:
    x, y = features.x["train"][:6].astype(np.float64), features.y["train"][:6]
    _, c = fit_logistic_regression(x, y, x[:0], y[:0], fewshot())
    grid = {"C": [0.01, 1, 100]}
    search = GridSearchCV(LogisticRegression(max_iter=5000, tol=1e-6), grid, cv=StratifiedKFold(2)).fit(x, y)
    assert c == search.best_params_["C"]
    assert fit_logistic_regression(x[:3], y[:3], x[:0], y[:0], fewshot())[1] == 7


def test_projection_serves_more_features_than_images_only() -> None:
    x, y = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32), np.arange(6) % 2
    for images_of, steps in ((x, 2), (x[:, :6], 1), (x[:, :5], 1)):
        model, _ = fit_logistic_regression(images_of, y, images_of, y, fewshot(choose="fixed"))
        assert len(model) == steps
        assert model[-1].coef_.dtype == np.float64
        assert (model[-1].max_iter, model[-1].tol, model[-1].C) == (5000, 1e-6, 7)


def test_search_tries_the_grid_with_and_without_an_intercept(features: Features) -> None:
    x, y = features.x["train"], features.y["train"]
    for intercept in (True, False):
        model, _ = fit_logistic_regression(x, y, x, y, fewshot(intercept=intercept))
        search = model[-1]
        assert search.param_grid == {"C": [0.01, 1, 100]}
        assert (search.cv.n_splits, search.cv.shuffle) == (3, False)
        of = search.best_estimator_
        assert (of.fit_intercept, of.max_iter, of.tol) == (intercept, 5000, 1e-6)


def test_strength_is_the_first_of_the_best_on_val(features: Features) -> None:
    x, y, x_val = features.x["train"], features.y["train"], features.x["val"]
    equal = fewshot(choose="validation", c_grid=[2.0, 2.0000001, 1e-9])
    model, c = fit_logistic_regression(x, y, x_val, features.y["val"], equal)
    assert (c, model[-1].C) == (2.0, 2.0)


@pytest.mark.parametrize(("scaling", "scale"), [("standardized", standardizer), ("normalized", normalizer)])
def test_every_subset_is_fitted_scored_and_kept(scaling: str, scale: Any, features: Features) -> None:
    params = fewshot(scaling=scaling, choose="validation")
    scaled = scale(features.x["train"], features.x["unlabeled"])
    subsets, outcomes = [subset(features, *FEW), subset(features, *MORE)], []
    for rows in (FEW, MORE):
        x, y = scaled(features.x["train"][list(rows)]), features.y["train"][list(rows)]
        outcomes.append(fit_logistic_regression(x, y, scaled(features.x["val"]), features.y["val"], params))
    outcome = evaluate_fewshot(features, subsets, params)
    for number, (model, _) in enumerate(outcomes):
        table = outcome.predictions.query(f"subset == {number}")
        assert table["prediction"].tolist() == model.predict(scaled(features.x["test"])).tolist()
    assert outcome.metrics["c"] == np.median([c for _, c in outcomes])
    assert (outcome.metrics["labels"], outcome.metrics["unconverged"]) == (24, 0)
    on_val = [model.score(scaled(features.x["val"]), features.y["val"]) for model, _ in outcomes]
    model, _ = outcomes[int(np.argmax(on_val))]
    kept = outcome.classifier
    assert kept is not None
    assert kept.head is not None
    assert (kept.head.pool, kept.head.blocks, kept.head.normalized) == ("average", 2, scaling == "normalized")
    raw = scaled(features.x["test"]) if kept.head.normalized else features.x["test"]
    expected = model.decision_function(scaled(features.x["test"])) / kept.temperature
    assert np.allclose(kept.head.logits(raw), expected, atol=1e-4)


def test_unconverged_regressions_are_told_once(
    features: Features, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subsets = [subset(features, *FEW), subset(features, *MORE)]
    evaluate_fewshot(features, subsets, fewshot())
    assert not capsys.readouterr().out
    monkeypatch.setattr(module, "_converged", lambda model: model[-1].best_params_ == {})
    assert evaluate_fewshot(features, subsets, fewshot()).metrics["unconverged"] == 2
    assert capsys.readouterr().out == "warning: 2 of 2 regressions stopped after 5000 steps, not converged\n"


def test_regression_that_took_the_last_step_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), np.arange(30) % 3
    model, _ = fit_logistic_regression(x, y, x, y, fewshot(choose="fixed"))
    steps = int(model[-1].n_iter_.max())
    assert module._converged(model)
    monkeypatch.setattr(module, "MAX_ITER", steps)
    assert not module._converged(model)
    monkeypatch.setattr(module, "MAX_ITER", steps + 1)
    assert module._converged(model)


def test_propagation_gets_graph_labels_and_device(features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    settings = PropagationParams(k=[2, 4], alpha=[0.5, 0.9])
    found = [(2, 0.5), (4, 0.9)]

    def choose(*about: Any) -> ChosenPropagation:
        asked.append(about)
        k, alpha = found[len(asked) - 1]
        chosen = choose_propagation(*about)
        return ChosenPropagation(k, alpha, chosen.val, chosen.propagated, chosen.classifier)

    searched: list[Any] = []
    find = module.find_neighbours
    monkeypatch.setattr(module, "find_neighbours", lambda *about: searched.append(about) or find(*about))  # type: ignore[func-returns-value]
    monkeypatch.setattr(module, "choose_propagation", choose)
    subsets = [subset(features, *FEW), subset(features, *MORE)]
    outcome = evaluate_propagation(features, subsets, fewshot(), settings, CPU)
    scale = standardizer(features.x["train"], features.x["unlabeled"])
    x_all = scale(np.concatenate([features.x["train"], features.x["unlabeled"]]))
    ((x, k, device),) = searched
    assert np.array_equal(x, x_all)
    assert (k, device) == (4, CPU)
    for rows, (neighbours, of_all, known, x_val, y_val, classes, params) in zip((FEW, MORE), asked, strict=True):
        assert np.array_equal(of_all, x_all)
        assert neighbours.rows.shape == (72, 4)
        labels = np.full(72, UNKNOWN)
        labels[list(rows)] = features.y["train"][list(rows)]
        assert known.tolist() == labels.tolist()
        assert np.array_equal(x_val, scale(features.x["val"]))
        assert (y_val is features.y["val"], classes, params) == (True, CLASSES, settings)
    metrics = outcome.metrics
    assert (metrics["k"], metrics["alpha"], metrics["unlabelled"]) == (3.0, 0.7, 72.0 - 24)
    assert {"test/top1", "temperature", "labels", "test/top1_subset1"} <= metrics.keys()


def test_temperature_of_a_propagation_is_vals(features: Features) -> None:
    outcome = evaluate_propagation(features, [subset(features, *FEW)], fewshot(), PropagationParams(k=[4]), CPU)
    kept = outcome.classifier
    assert kept is not None
    assert kept.head is not None
    logits = kept.temperature * kept.head.logits(features.x["val"].astype(np.float64))
    assert outcome.metrics["temperature"] == pytest.approx(kept.temperature, abs=1e-4)
    assert kept.temperature == pytest.approx(fit_temperature(logits, features.y["val"]).value, rel=1e-3)


def test_regressions_of_a_propagation_may_stop_early(features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps are not counted, and nothing is warned of."""
    monkeypatch.setattr("lgp.evaluate.propagation.MAX_ITER", 1)
    outcome = evaluate_propagation(features, [subset(features, *FEW)], fewshot(), PropagationParams(k=[4]), CPU)
    assert isinstance(outcome, Outcome)


def test_class_without_an_image_has_the_lowest_logit(features: Features) -> None:
    y = features.y["train"] % 2 * 2  # of the classes 0 and 2
    model, _ = fit_logistic_regression(features.x["train"], y, features.x["train"], y, fewshot(choose="fixed"))
    head = module.head_of(model, 4)
    logits = head.logits(features.x["test"])
    assert (logits[:, [1, 3]] == -1e4).all()
    assert np.allclose(logits[:, 2] - logits[:, 0], model.decision_function(features.x["test"]))
    assert (logits[:, 0] == 0).all()


def test_head_is_scored_at_the_given_temperature_or_vals(features: Features) -> None:
    head, scale = Head(2 * np.eye(CLASSES, WIDTH), np.ones(CLASSES)), standardizer(features.x["train"])
    scored, kept = module._scored(head, scale, features, 3.0)
    assert (scored.scores["temperature"], kept.temperature) == (3.0, 3.0)
    assert kept.head is not None
    x = features.x["test"].astype(np.float64)
    assert np.allclose(kept.head.logits(x), head.logits((x - scale.mean) / scale.std) / 3)
    assert module._scored(head, scale, features, None)[1].temperature != 1


def test_two_classes_without_an_intercept_and_with_a_feature_that_is_always_0() -> None:
    rng = np.random.default_rng(0)
    x, y = np.column_stack([rng.normal(size=(20, 3)), np.zeros(20)]), np.arange(20) % 2
    model, _ = fit_logistic_regression(x, y, x, y, fewshot(choose="fixed", intercept=False))
    head = module.head_of(model, 2)
    assert head.weight.tolist() == [[0] * 4, model[-1].coef_[0].tolist()]
    assert head.bias.tolist() == [0, 0]


def test_subset_of_two_classes_is_fitted(features: Features) -> None:
    rows = [row for row in range(40) if row % CLASSES != 1]
    outcome = evaluate_fewshot(features, [subset(features, *rows)], fewshot())
    assert set(outcome.predictions["prediction"]) == {0, 2}


def test_other_warnings_than_that_of_convergence_are_passed_on(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(of: Any) -> Any:
        return lambda *about: warnings.warn("something else", UserWarning, stacklevel=1) or of(*about)  # type: ignore[func-returns-value]

    few = [subset(features, *FEW)]
    monkeypatch.setattr(module, "choose_propagation", warned(module.choose_propagation))
    with pytest.warns(UserWarning, match="something else"):
        evaluate_propagation(features, few, fewshot(), PropagationParams(k=[4]), CPU)
    monkeypatch.setattr(module, "make_pipeline", warned(module.make_pipeline))
    with pytest.warns(UserWarning, match="something else"):
        evaluate_fewshot(features, few, fewshot())
