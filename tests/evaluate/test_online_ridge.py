"""Online ridge regression: against scikit-learn, which labels it takes, and what turns it off."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

import stages.pretraining as module
from lgp.data.labels import LabelledImages
from lgp.data.storage import Images
from lgp.evaluate.online_ridge import RIDGE, OnlineRidge, fewest_labels
from lgp.features.extraction import extract, features_of
from lgp.features.online_knn import OnlineKnn
from lgp.models.encoder_folder import load_encoder
from lgp.params.file import Params
from lgp.params.run import OnlineKnnParams
from lgp.pretrain.arm import Session

CPU = torch.device("cpu")


def by_scikit_learn(x: np.ndarray, y: np.ndarray, x_val: np.ndarray, params: Any) -> np.ndarray:
    """Predict val by ridge regression on one-hot labels, with the C that cross-validation finds."""
    targets = np.eye(10)[y]

    def predicted(c: float, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
        scores = Ridge(alpha=1 / c).fit(x[rows], targets[rows]).predict(queries)
        scores[:, np.setdiff1d(np.arange(10), y[rows])] = -np.inf
        return scores.argmax(axis=1)

    if np.bincount(y).min() < 2:
        return predicted(params.c_fixed, np.arange(len(y)), x_val)
    folds = list(StratifiedKFold(min(params.folds, int(np.bincount(y).min()))).split(x, y))
    right = [np.mean([(predicted(c, rows, x[out]) == y[out]).mean() for rows, out in folds]) for c in params.c_grid]
    return predicted(params.c_grid[int(np.argmax(right))], np.arange(len(y)), x_val)


@pytest.mark.parametrize(
    ("name", "choose"),
    [("10pct", "cross_validation"), ("10pct", "fixed"), ("1pct", "cross_validation")],  # a single image of each class
)
def test_it_is_ridge_of_scikit_learn_over_all_subsets(
    name: str, choose: str, prepared: LabelledImages, encoder_folder: Path, params: Params
) -> None:
    encoder, fewshot = load_encoder(encoder_folder), params.fewshot.model_copy(update={"choose": choose})
    subsets = prepared.subsets(name)
    knn = OnlineKnn(
        prepared, OnlineKnnParams(every_epochs=2, train_images=100), more=OnlineRidge(prepared, subsets, fewshot)
    )
    assert knn.after_epoch(1, encoder, CPU) == {}
    found = knn.after_epoch(2, encoder, CPU)[RIDGE]

    def x_of(ids: np.ndarray) -> np.ndarray:
        return extract(features_of(encoder, CPU), prepared, ids).astype(np.float64)

    assert knn.more(replace(knn._see(features_of(encoder, CPU)), of=lambda ids: np.full((len(ids), 16), np.nan))) == {}
    scaler, val, labels = StandardScaler().fit(x_of(knn.train)), knn.val, prepared.labels
    x_val = scaler.transform(x_of(val))
    of_each = [by_scikit_learn(scaler.transform(x_of(ids)), labels[ids], x_val, fewshot) for ids in subsets]
    expected = [100 * (predicted == labels[val]).mean() for predicted in of_each]
    assert len(set(expected)) > 1
    assert found == pytest.approx(np.mean(expected), abs=0.01)


def test_it_takes_the_fewest_labels_that_two_classes_have(
    prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewest = prepared.subsets("1pct")
    found = fewest_labels(prepared, ["10pct", "all", "1pct", "not drawn yet"], 10**6)
    assert len(found) == len(fewest) > 1
    assert all((mine == its).all() for mine, its in zip(found, fewest, strict=True))
    each = len(fewest[0])
    assert [len(fewest_labels(prepared, ["1pct"], most)) for most in (1, 2 * each, 3 * each - 1)] == [1, 2, 2]
    assert fewest_labels(prepared, ["all", "not drawn yet"], 10**6) == []
    monkeypatch.setattr(LabelledImages, "subsets", lambda self, _: [np.flatnonzero(self.labels == 3)[:4]])
    assert fewest_labels(prepared, ["1pct"], 10**6) == []


@pytest.mark.parametrize(
    ("labels", "changes", "asked"),
    [
        (True, {}, True),
        (True, {"train_images": 3}, True),
        (True, {"ridge": False}, False),
        (True, {"every_epochs": 0}, False),
        (False, {}, False),
    ],
)
def test_a_training_measures_it_where_there_are_labels_and_it_is_not_turned_off(
    labels: bool, changes: dict[str, Any], asked: bool, prepared: LabelledImages, params: Params
) -> None:
    knn = params.run.online_knn.model_copy(update=changes)
    given = params.model_copy(update={"run": params.run.model_copy(update={"online_knn": knn})})
    session: Any = Session(Images(prepared.folder), given, None, None, prepared if labels else None)  # type: ignore[arg-type]
    more = module._with_ridge(session, given).more
    assert isinstance(more, OnlineRidge) == asked
    if asked:
        fewest = prepared.subsets("1pct")[: 1 if changes else None]
        assert [ids.tolist() for ids in more.subsets] == [ids.tolist() for ids in fewest]
        assert (more.params, more.device, more.data) == (given.fewshot, CPU, prepared)
