"""What few-label evaluation asks of its parts, on random features: scaling, folds, temperature, what is kept."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from lgp.evaluate import few_labels as module
from lgp.evaluate.calibration import fit_temperature
from lgp.evaluate.few_labels import Fitted, Images, evaluate_fewshot, evaluate_propagation, fit_few_labels
from lgp.evaluate.logistic import fit_logistic
from lgp.evaluate.propagation import UNKNOWN, ChosenPropagation, choose_propagation, find_neighbours
from lgp.evaluate.regression import Problems
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


def fitted(x: np.ndarray, y: np.ndarray, params: FewShotParams, val: Images | None = None) -> Fitted:
    (found,) = fit_few_labels([Images(x, y)], val, CLASSES, params)
    return found


def test_temperature_is_of_logits_that_each_fold_left_out(features: Features) -> None:
    x = standardizer(features.x["train"], features.x["unlabeled"])(features.x["train"])[:42].astype(np.float64)
    y = features.y["train"][:42]
    for params in (fewshot(c_grid=[0.5]), fewshot(choose="fixed", c_fixed=0.5)):
        logits = np.empty((42, CLASSES))
        for rest, left_out in StratifiedKFold(3).split(x, y):
            model = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8).fit(x[rest], y[rest])
            logits[left_out] = model.decision_function(x[left_out])
        expected = fit_temperature(logits, y)
        assert not expected.at_bound
        assert fitted(x, y, params).temperature == pytest.approx(expected.value, abs=1e-4)


@pytest.mark.parametrize(
    ("images", "changes", "found"),
    [
        (18, {}, False),  # fewer than 20
        (20, {}, True),
        (21, {"choose": "fixed"}, True),
        (21, {"folds": 2}, True),
    ],
)
def test_temperature_within_the_labels_needs_enough_of_them(
    images: int, changes: dict[str, Any], found: bool, features: Features
) -> None:
    x, y = features.x["train"][:images], features.y["train"][:images]
    assert (fitted(x, y, fewshot(**changes)).temperature is not None) is found
    assert fitted(x, y, fewshot(**changes), Images(x, y)).temperature is None  # val chooses C: it may choose this too
    alone = np.append(y[y != 2], 2)  # one image of a class
    assert fitted(features.x["train"][: len(alone)], alone, fewshot(**changes)).temperature is None


def test_single_image_of_a_class_leaves_the_temperature_to_val_among_many_others(features: Features) -> None:
    y = features.y["train"][:40]
    y = np.append(y[y != 2], 2)
    assert len(y) > 20
    of = fitted(features.x["train"][: len(y)], y, fewshot())
    assert (of.temperature, of.c) == (None, 7)


def test_folds_are_no_more_than_the_images_of_the_rarest_class() -> None:
    assert module._folds(np.array([0] * 9 + [4] * 2), fewshot()) == 2
    assert module._folds(np.array([0] * 9 + [4] * 5), fewshot()) == 3
    assert module._folds(np.array([1, 1, 2]), fewshot()) == 1


def test_two_images_a_class_are_cross_validated_in_two_folds(features: Features) -> None:
    x, y = features.x["train"][:6].astype(np.float64), features.y["train"][:6]
    grid = {"C": [0.01, 1, 100]}
    search = GridSearchCV(LogisticRegression(max_iter=5000, tol=1e-8), grid, cv=StratifiedKFold(2)).fit(x, y)
    assert fitted(x, y, fewshot()).c == search.best_params_["C"]
    assert fitted(x[:3], y[:3], fewshot()).c == 7


def test_folds_choose_the_strength_with_and_without_an_intercept(features: Features) -> None:
    x, y = features.x["train"].astype(np.float64), features.y["train"]
    for intercept in (True, False):
        model = LogisticRegression(fit_intercept=intercept, max_iter=5000, tol=1e-8)
        search = GridSearchCV(model, {"C": [0.01, 1, 100]}, cv=StratifiedKFold(3)).fit(x, y)
        found = fitted(x, y, fewshot(intercept=intercept))
        assert found.c == search.best_params_["C"]
        expected = search.best_estimator_.decision_function(x)
        assert np.abs(found.head.logits(x) - expected).max() < 1e-4


def test_strength_is_the_first_of_the_best_on_val(features: Features) -> None:
    x, y = features.x["train"], features.y["train"]
    equal = fewshot(choose="validation", c_grid=[2.0, 2.0000001, 1e-9])
    assert fitted(x, y, equal, Images(features.x["val"], features.y["val"])).c == 2.0


def test_subsets_of_other_sizes_and_folds_are_fitted_as_alone(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, params = features.x["train"], features.y["train"], fewshot()
    chosen = [list(FEW), list(MORE), [0, 1, 3, 4, 5], list(range(30, 54)), [7, 8, 9]]
    subsets = [Images(x[rows], y[rows]) for rows in chosen]
    together: list[int] = []
    monkeypatch.setattr(module, "Problems", lambda x, *of: together.append(len(x)) or Problems(x, *of))  # type: ignore[func-returns-value]
    found = fit_few_labels(subsets, None, CLASSES, params)
    assert sorted(together) == [1, 1, 1, 2]
    monkeypatch.setattr(module, "TOGETHER", 1)  # nothing fits into memory beside another
    alone = fit_few_labels(subsets, None, CLASSES, params)
    assert together[4:] == [1] * 5
    for one, other, of in zip(found, alone, subsets, strict=True):
        assert one.c == other.c
        assert one.c == fitted(of.x, of.y, params).c
        assert np.abs(one.head.logits(features.x["test"]) - other.head.logits(features.x["test"])).max() < 1e-4


@pytest.mark.parametrize(("width", "inner"), [(WIDTH, WIDTH), (30, 24)])
def test_as_many_subsets_are_fitted_together_as_memory_allows(
    width: int, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subset has its features; each fold and the whole have steps, changes and room to compute for ten steps."""
    x, y, together = np.random.default_rng(0).normal(size=(24, width)), np.arange(24) % CLASSES, list[int]()
    monkeypatch.setattr(module, "Problems", lambda x, *of: together.append(len(x)) or Problems(x, *of))  # type: ignore[func-returns-value]
    each = 24 * width + 3 * 10 * 4 * inner * CLASSES
    for memory in (2 * each, 2 * each - 1):
        monkeypatch.setattr(module, "TOGETHER", memory)
        fit_few_labels([Images(x, y)] * 3, None, CLASSES, fewshot(choose="fixed"))
    assert together == [2, 1, 1, 1, 1]


@pytest.mark.parametrize(("scaling", "scale"), [("standardized", standardizer), ("normalized", normalizer)])
def test_every_subset_is_fitted_scored_and_kept(scaling: str, scale: Any, features: Features) -> None:
    params = fewshot(scaling=scaling, choose="validation")
    scaled = scale(features.x["train"], features.x["unlabeled"])
    val, outcomes = Images(scaled(features.x["val"]), features.y["val"]), []
    subsets = [subset(features, *FEW), subset(features, *MORE)]
    for rows in (FEW, MORE):
        x, y = scaled(features.x["train"][list(rows)]), features.y["train"][list(rows)]
        outcomes.append(fitted(x, y, params, val))
    outcome = evaluate_fewshot(features, subsets, params)
    for number, of in enumerate(outcomes):
        table = outcome.predictions.query(f"subset == {number}")
        assert table["prediction"].tolist() == of.head.logits(scaled(features.x["test"])).argmax(1).tolist()
    assert outcome.metrics["c"] == np.median([of.c for of in outcomes])
    assert (outcome.metrics["labels"], outcome.metrics["unconverged"]) == (24, 0)
    on_val = [(of.head.logits(val.x).argmax(1) == val.y).mean() for of in outcomes]
    head = outcomes[int(np.argmax(on_val))].head
    kept = outcome.classifier
    assert kept is not None
    assert kept.head is not None
    assert (kept.head.pool, kept.head.blocks, kept.head.normalized) == ("average", 2, scaling == "normalized")
    raw = scaled(features.x["test"]) if kept.head.normalized else features.x["test"]
    expected = head.logits(scaled(features.x["test"])) / kept.temperature
    assert np.allclose(kept.head.logits(raw), expected, atol=1e-4)


def test_unconverged_regressions_are_told_once(
    features: Features, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subsets = [subset(features, *FEW), subset(features, *MORE)]
    evaluate_fewshot(features, subsets, fewshot())
    assert not capsys.readouterr().out
    monkeypatch.setattr("lgp.evaluate.logistic.MAX_ITER", 1)
    assert evaluate_fewshot(features, subsets, fewshot()).metrics["unconverged"] == 2
    assert capsys.readouterr().out == "warning: 2 of 2 regressions stopped after 5000 steps, not converged\n"


def test_the_classifier_of_all_images_is_the_one_that_must_converge(
    features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the folds, which lie before it."""

    def all_but_one(number: int) -> Any:
        def fit(problems: Problems, strengths: list[float]) -> Any:
            for found in fit_logistic(problems, strengths):
                found.converged[:, number] = False
                yield found

        return fit

    for number, unconverged in ((0, 0), (-1, 1)):
        monkeypatch.setitem(module.METHODS, "logistic", all_but_one(number))
        assert evaluate_fewshot(features, [subset(features, *FEW)], fewshot()).metrics["unconverged"] == unconverged


def test_few_labels_are_fitted_on_the_device_that_is_given(features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that propagate."""
    devices: list[Any] = []
    for of in (module, "lgp.evaluate.propagation"):
        name = of if isinstance(of, str) else of.__name__

        def problems(*about: Any, intercept: bool | None = None, device: Any = None) -> Problems:
            devices.append(device or about[-1])
            return Problems(*about[:4], True, CPU)

        monkeypatch.setattr(f"{name}.Problems", problems)
    meta, few = torch.device("meta"), [subset(features, *FEW)]
    monkeypatch.setattr(module, "find_neighbours", lambda x, k, device: find_neighbours(x, k))
    evaluate_fewshot(features, few, fewshot(), meta)
    evaluate_propagation(features, few, fewshot(), PropagationParams(k=[4]), meta)
    assert devices == [meta, meta]


def test_propagation_gets_graph_labels_and_device(features: Features, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    settings = PropagationParams(k=[2, 4], alpha=[0.5, 0.9])
    found = [(2, 0.5), (4, 0.9)]

    def choose(*about: Any) -> ChosenPropagation:
        asked.append(about)
        k, alpha = found[len(asked) - 1]
        chosen = choose_propagation(*about)
        return ChosenPropagation(k, alpha, chosen.val, chosen.propagated, chosen.head, converged=len(asked) < 2)

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
    for rows, (neighbours, of_all, known, x_val, y_val, classes, params, device) in zip(
        (FEW, MORE), asked, strict=True
    ):
        assert np.array_equal(of_all, x_all)
        assert neighbours.rows.shape == (72, 4)
        labels = np.full(72, UNKNOWN)
        labels[list(rows)] = features.y["train"][list(rows)]
        assert known.tolist() == labels.tolist()
        assert np.array_equal(x_val, scale(features.x["val"]))
        assert (y_val is features.y["val"], classes, params, device) == (True, CLASSES, settings, CPU)
    metrics = outcome.metrics
    assert (metrics["k"], metrics["alpha"], metrics["unlabelled"], metrics["unconverged"]) == (3.0, 0.7, 72.0 - 24, 1)
    assert {"test/top1", "temperature", "labels", "test/top1_subset1"} <= metrics.keys()


def test_temperature_of_a_propagation_is_vals(features: Features) -> None:
    outcome = evaluate_propagation(features, [subset(features, *FEW)], fewshot(), PropagationParams(k=[4]), CPU)
    kept = outcome.classifier
    assert kept is not None
    assert kept.head is not None
    logits = kept.temperature * kept.head.logits(features.x["val"].astype(np.float64))
    assert outcome.metrics["temperature"] == pytest.approx(kept.temperature, abs=1e-4)
    assert kept.temperature == pytest.approx(fit_temperature(logits, features.y["val"]).value, rel=1e-3)


def test_regressions_of_a_propagation_that_stop_early_are_told(
    features: Features, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lgp.evaluate.logistic.MAX_ITER", 1)
    few = [subset(features, *FEW)]
    assert evaluate_propagation(features, few, fewshot(), PropagationParams(k=[4]), CPU).metrics["unconverged"] == 1
    assert "warning: 1 of 1 regressions stopped after" in capsys.readouterr().out


def test_class_without_an_image_has_the_lowest_logit(features: Features) -> None:
    y = features.y["train"] % 2 * 2  # of the classes 0 and 2
    (of,) = fit_few_labels([Images(features.x["train"], y)], None, 4, fewshot(choose="fixed"))
    logits = of.head.logits(features.x["test"])
    assert (logits[:, [1, 3]] == -1e4).all()
    model = LogisticRegression(C=7, max_iter=5000, tol=1e-10).fit(features.x["train"].astype(np.float64), y)
    assert np.abs(logits[:, 2] - logits[:, 0] - model.decision_function(features.x["test"])).max() < 1e-4


def test_head_is_scored_at_the_given_temperature_or_vals(features: Features) -> None:
    head, scale = Head(2 * np.eye(CLASSES, WIDTH), np.ones(CLASSES)), standardizer(features.x["train"])
    scored, kept = module._scored(head, scale, features, 3.0)
    assert (scored.scores["temperature"], kept.temperature) == (3.0, 3.0)
    assert kept.head is not None
    x = features.x["test"].astype(np.float64)
    assert np.allclose(kept.head.logits(x), head.logits((x - scale.mean) / scale.std) / 3)
    assert module._scored(head, scale, features, None)[1].temperature != 1


def test_subset_of_two_classes_is_fitted(features: Features) -> None:
    rows = [row for row in range(40) if row % CLASSES != 1]
    outcome = evaluate_fewshot(features, [subset(features, *rows)], fewshot())
    assert set(outcome.predictions["prediction"]) == {0, 2}
