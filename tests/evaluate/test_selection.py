"""Which images to label next: each method against a slow reference on 60 points, and what none of them may choose."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score

from lgp.compute.randomness import counted_seed
from lgp.errors import LgpError
from lgp.evaluate import selection as module
from lgp.evaluate.selection import (
    Selection,
    at_random,
    centroid,
    coverage,
    margin,
    mean_distances,
    pure_radius,
    select,
    selected_subsets,
    typicality,
    unit,
)
from lgp.features.cache import Features, standardizer
from lgp.params.evaluate import FeatureParams, FewShotParams
from lgp.params.selection import Method

FIXED = FewShotParams.model_validate(
    {"scaling": "standardized", "choose": "fixed", "c_grid": [1], "c_fixed": 0.5, "folds": 2}
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_MIB", 0.003)  # six rows of distances at a time


@pytest.fixture
def x() -> np.ndarray:
    """60 points on the sphere, in four groups of different size and width."""
    points, _ = make_blobs([25, 18, 12, 5], 4, cluster_std=[1.0, 2.0, 1.5, 0.5], random_state=1)
    return unit(np.random.default_rng(0).permutation(points))


@pytest.fixture
def labels() -> np.ndarray:
    """Labels of seven of the points, of two classes."""
    labels = np.full(60, -1)
    labels[[3, 11, 12, 30, 44, 45, 59]] = [0, 1, 1, 0, 1, 0, 0]
    return labels


NOTHING = np.zeros(60, dtype=bool)


def matrix(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return np.sqrt(((wide[:, None] - wide[None]) ** 2).sum(axis=2))


def clusters_of(x: np.ndarray, number: int, seed: int) -> np.ndarray:
    return KMeans(number, n_init=10, random_state=seed).fit(x).labels_


def slow_typicality(x: np.ndarray, known: np.ndarray, budget: int, seed: int) -> list[int]:
    cluster, distances, taken, chosen = clusters_of(x, known.sum() + budget, seed), matrix(x), known.copy(), []

    def score(i: int) -> float:
        others = sorted(distances[i, j] for j in range(len(x)) if j != i and cluster[j] == cluster[i])
        return float(np.mean(others[:20])) if others else 0.0

    for _ in range(budget):
        free = [c for c in sorted(set(cluster)) if (~taken[cluster == c]).any()]
        # small clusters last, then by labels, then by size
        best = min(free, key=lambda c: ((cluster == c).sum() <= 5, taken[cluster == c].sum(), -(cluster == c).sum()))
        image = min((i for i in range(len(x)) if cluster[i] == best and not taken[i]), key=score)
        taken[image] = True
        chosen.append(image)
    return chosen


@pytest.mark.parametrize("budget", [3, 10, 40])
@pytest.mark.parametrize("some", [False, True])
def test_typicality_is_typiclust(x: np.ndarray, labels: np.ndarray, budget: int, some: bool) -> None:
    known = labels >= 0 if some else NOTHING
    found = typicality(x, known, budget, 5)
    assert found.images.tolist() == slow_typicality(x, known, budget, 5)
    assert found.clusters.tolist() == clusters_of(x, known.sum() + budget, 5)[found.images].tolist()


def test_typicality_begins_in_the_largest_clusters_without_a_label(x: np.ndarray) -> None:
    known = NOTHING.copy()
    cluster = clusters_of(x, 4, 0)
    largest = np.argsort(-np.bincount(cluster), kind="stable")
    assert typicality(x, known, 4, 0).clusters.tolist() == [c for c in largest if (cluster == c).sum() > 5] + [
        c for c in largest if (cluster == c).sum() <= 5
    ]
    known[np.flatnonzero(cluster == largest[0])[0]] = True
    # one label and three chosen images are four clusters too
    assert typicality(x, known, 3, 0).clusters.tolist() == [c for c in largest if c != largest[0]]


def test_number_of_clusters_has_a_limit(x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CLUSTERS", 4)
    found = typicality(x, NOTHING, 12, 0)
    assert len(np.unique(found.images)) == 12
    assert found.clusters.max() == 3


def test_neighbours_are_the_twenty_nearest_of_the_cluster(x: np.ndarray) -> None:
    cluster = np.array([0] * 40 + [1] * 19 + [2])
    distances = matrix(x)
    expected = [np.sort(distances[i, :40])[1:21].mean() for i in range(40)]
    expected += [np.sort(distances[i, 40:59])[1:].mean() for i in range(40, 59)]
    assert mean_distances(x, cluster) == pytest.approx([*expected, 0], abs=1e-5)


def slow_radius(x: np.ndarray, cluster: np.ndarray) -> float:
    distances = matrix(x)

    def purity(radius: float) -> float:
        mixed = (distances < radius) & (cluster[:, None] != cluster)
        return 1 - mixed.any(axis=1).mean()

    return max(radius for radius in np.unique(distances) if radius > 0 and purity(radius) >= 0.95)


@pytest.mark.parametrize("number", [2, 4, 9])
def test_balls_are_as_large_as_95_percent_of_them_stay_pure(x: np.ndarray, number: int) -> None:
    cluster = clusters_of(x, number, 0)
    assert pure_radius(x, cluster) == pytest.approx(slow_radius(x, cluster), rel=1e-4)
    assert pure_radius(x, np.zeros(60)) == np.inf


def slow_coverage(x: np.ndarray, known: np.ndarray, budget: int, seed: int, classes: int) -> list[int]:
    distances = matrix(x)
    radius = slow_radius(x, clusters_of(x, classes, seed)) * (1 - 1e-5)
    edges, centres = distances < radius, np.flatnonzero(known).tolist()
    chosen: list[int] = []
    for _ in range(budget):
        covered = edges[centres + chosen].any(axis=0)
        gain = (edges & ~covered).sum(axis=1)
        gain[centres + chosen] = -1
        if gain.max() <= 0:
            gain = distances[centres + chosen].min(axis=0)
            gain[centres + chosen] = -1
        chosen.append(int(gain.argmax()))
    return chosen


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("classes", [2, 4, 9])
def test_coverage_is_probcover(x: np.ndarray, labels: np.ndarray, some: bool, classes: int) -> None:
    known = labels >= 0 if some else NOTHING
    expected = slow_coverage(x, known, 30, 3, classes)
    found = coverage(x, known, 30, 3, classes)
    assert found.images.tolist() == expected
    assert found.clusters.tolist() == clusters_of(x, classes, 3)[expected].tolist()


def test_centroids_have_the_nearest_unlabelled_image(x: np.ndarray, labels: np.ndarray) -> None:
    free = np.flatnonzero(labels < 0)
    model = KMeans(6, n_init=10, random_state=2).fit(x[free])
    nearest = {int(free[np.linalg.norm(x[free] - centre, axis=1).argmin()]) for centre in model.cluster_centers_}
    found = centroid(x, labels >= 0, 6, 2)
    assert set(found.images.tolist()) == nearest
    sizes = np.bincount(model.labels_)[found.clusters]
    assert sizes.tolist() == sorted(sizes, reverse=True)


def test_margin_takes_the_least_sure_image_of_each_cluster(x: np.ndarray, labels: np.ndarray) -> None:
    labels[[0, 1]] = 2
    free, known = np.flatnonzero(labels < 0), labels >= 0
    scaled = standardizer(x)(x).astype(np.float64)
    model = LogisticRegression(C=0.5, max_iter=5000, tol=1e-8).fit(scaled[known], labels[known])
    cluster = clusters_of(x[free], 6, 2)
    expected = set()
    for c in range(6):
        sure = {}
        for image in free[cluster == c].tolist():
            second, first = sorted(model.predict_proba(scaled[[image]])[0])[1:]
            sure[image] = first - second
        expected.add(min(sure, key=sure.__getitem__))
    assert set(margin(x, labels, 6, 2, FIXED).images.tolist()) == expected


@pytest.mark.parametrize("choose", ["validation", "cross_validation"])
def test_margin_needs_no_validation_images(x: np.ndarray, labels: np.ndarray, choose: str) -> None:
    params = FIXED.model_copy(update={"choose": choose, "c_grid": [0.1, 10]})
    assert len(margin(x, labels, 6, 2, params).images) == 6


METHODS: dict[str, Callable[..., Selection]] = {
    "typicality": lambda x, labels, budget, seed: typicality(x, labels >= 0, budget, seed),
    "coverage": lambda x, labels, budget, seed: coverage(x, labels >= 0, budget, seed, 9),
    "centroid": lambda x, labels, budget, seed: centroid(x, labels >= 0, budget, seed),
    "margin": lambda x, labels, budget, seed: margin(x, labels, budget, seed, FIXED),
    "random": lambda _x, labels, budget, seed: at_random(labels >= 0, budget, seed),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 20, 53])
def test_images_are_unlabelled_and_different(method: str, budget: int, x: np.ndarray, labels: np.ndarray) -> None:
    found = METHODS[method](x, labels, budget, 0)
    assert found.images.shape == found.clusters.shape == (budget,)
    assert len(set(found.images.tolist())) == budget
    assert (labels[found.images] < 0).all()
    assert METHODS[method](x, labels, budget, 0).images.tolist() == found.images.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_equal_images_can_be_chosen_too(method: str, labels: np.ndarray) -> None:
    found = METHODS[method](unit(np.ones((60, 3))), labels, 10, 0)
    assert len(set(found.images.tolist())) == 10


@pytest.mark.parametrize("method", METHODS)
def test_seed_decides(method: str, labels: np.ndarray) -> None:
    x = unit(np.random.default_rng(0).normal(size=(60, 6)))  # without groups, which any seed would find
    assert len({tuple(METHODS[method](x, labels, 9, seed).images.tolist()) for seed in range(6)}) > 1


def test_random_images_are_any(labels: np.ndarray) -> None:
    counts = sum(np.bincount(at_random(labels >= 0, 10, seed).images, minlength=60) for seed in range(500))
    assert (counts[labels >= 0] == 0).all()
    assert np.abs(counts[labels < 0] / 500 - 10 / 53).max() < 0.08  # four standard errors


def test_many_images_are_clustered_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    points, groups = make_blobs(600, 5, centers=6, cluster_std=0.5, random_state=0)
    monkeypatch.setattr(module, "EXACT", 0)
    found = centroid(points, np.zeros(600, dtype=bool), 6, 0)
    assert len(set(groups[found.images].tolist())) == 6
    monkeypatch.undo()
    exact = centroid(points, np.zeros(600, dtype=bool), 6, 0)
    assert adjusted_rand_score(groups[found.images], groups[exact.images]) == 1


def test_features_get_length_1() -> None:
    x = unit(np.array([[3, 4], [0, 0], [0, -2]], dtype=np.float16))
    assert x == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0, -1]]))
    assert x.dtype == np.float32


class TrainingOnly(dict[str, Any]):
    """Features of training images. Those of val and test may not be asked for."""

    def __missing__(self, split: str) -> None:
        raise AssertionError(f"{split} was read")


@pytest.mark.parametrize("method", list(Method))
def test_selection_is_by_ids_and_reads_training_images_alone(method: Method, x: np.ndarray, labels: np.ndarray) -> None:
    ids = 7 + 2 * np.arange(60)  # ids between them are of val and test
    known = {"train": labels >= 0, "unlabeled": labels < 0}
    features = Features(
        TrainingOnly({split: 5 * x[rows] for split, rows in known.items()}),
        TrainingOnly({split: labels[rows] for split, rows in known.items()}),
        TrainingOnly({split: ids[rows] for split, rows in known.items()}),
        9,
        {},
        FeatureParams(),
    )
    found = select(features, method, 9, 0, FIXED)
    assert found.images.tolist() == ids[METHODS[method](unit(5 * x), labels, 9, 0).images].tolist()
    assert np.isin(found.images, features.ids["unlabeled"]).all()


def labelled(x: np.ndarray, y: np.ndarray) -> Features:
    """Features of labelled training images with the ids 100, 102, …, and of images that no selection may see."""
    parts = {"train": x, "unlabeled": np.full((3, x.shape[1]), np.nan), "val": x + np.nan, "test": x + np.nan}
    labels = {"train": y, "unlabeled": np.full(3, -1), "val": y, "test": y}
    ids = {"train": 100 + 2 * np.arange(len(x)), "unlabeled": np.arange(3), "val": np.arange(60), "test": np.arange(60)}
    return Features(parts, labels, ids, 2, {}, FeatureParams())


RANDOM = [np.arange(100, 110, 2), np.arange(110, 120, 2), np.arange(120, 136, 2)]


@pytest.mark.parametrize("method", [Method.TYPICALITY, Method.COVERAGE, Method.CENTROID, Method.RANDOM])
def test_selected_subsets_are_as_large_as_the_random_ones_and_see_no_label(x: np.ndarray, method: Method) -> None:
    y = np.arange(60) % 2
    found = selected_subsets(labelled(x, y), RANDOM, method, 3, FIXED)
    assert [len(ids) for ids in found] == [5, 5, 8]
    for ids in found:
        assert len(set(ids)) == len(ids)
        assert set(ids) <= set(100 + 2 * np.arange(60))
        assert (np.diff(ids) > 0).all()
    others = selected_subsets(labelled(x, np.roll(y, 1)), RANDOM, method, 3, FIXED)
    assert [ids.tolist() for ids in others] == [ids.tolist() for ids in found]


def test_selected_subsets_are_those_of_the_method_without_any_label(x: np.ndarray) -> None:
    features = labelled(x, np.arange(60) % 2)
    for number, ids in enumerate(selected_subsets(features, RANDOM, Method.TYPICALITY, 3, FIXED)):
        seed = counted_seed(3, "selected", number) % 2**32
        slow = typicality(x, NOTHING, len(RANDOM[number]), seed).images
        assert ids.tolist() == sorted(100 + 2 * slow)
    of_seeds = [selected_subsets(features, RANDOM[:2], Method.RANDOM, seed, FIXED) for seed in (3, 3, 4)]
    assert [ids.tolist() for ids in of_seeds[0]] == [ids.tolist() for ids in of_seeds[1]]
    assert [ids.tolist() for ids in of_seeds[0]] != [ids.tolist() for ids in of_seeds[2]]
    assert of_seeds[0][0].tolist() != of_seeds[0][1].tolist()


def test_lengths_of_features_do_not_decide_a_selection(x: np.ndarray) -> None:
    lengths = np.random.default_rng(5).uniform(0.1, 10, (len(x), 1)).astype(np.float32)
    plain, scaled = (
        selected_subsets(labelled(of, np.arange(60) % 2), RANDOM, Method.TYPICALITY, 3, FIXED)
        for of in (x, lengths * x)
    )
    assert [ids.tolist() for ids in plain] == [ids.tolist() for ids in scaled]


def test_selection_of_a_single_class_is_refused(x: np.ndarray) -> None:
    y = np.zeros(60, dtype=np.int64)
    with pytest.raises(LgpError, match="the 5 images that typicality chose are all of one class"):
        selected_subsets(labelled(x, y), RANDOM, Method.TYPICALITY, 3, FIXED)
