"""k-NN against scikit-learn with the same weights."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from lgp.features.knn import knn_predict

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_predictions_equal_scikit_learns(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgp.features.knn.QUERIES", 7)
    monkeypatch.setattr("lgp.features.knn.CANDIDATES", 13)
    train, queries = RNG.normal(size=(200, 8)), RNG.normal(size=(50, 8))
    labels = RNG.integers(0, 4, 200)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = theirs.fit(train, labels).predict(queries)
    assert np.array_equal(knn_predict(train, labels, queries, 4, k, 0.07), expected)


def test_more_neighbours_than_images_means_all() -> None:
    train = np.eye(3)
    assert knn_predict(train, np.array([0, 1, 2]), np.array([[0.1, 0.9, 0.0]]), 3, 20, 0.07).tolist() == [1]
