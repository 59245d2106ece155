"""Label propagation against a dense solution, scikit-learn's label spreading and slow loops."""

import numpy as np
import pytest
from scipy import sparse
from scipy.special import softmax
from sklearn.datasets import load_digits, make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.semi_supervised import LabelSpreading

from lgp.errors import LgpError
from lgp.evaluate.propagation import (
    Propagated,
    affinity,
    choose_propagation,
    find_neighbours,
    fit_to_propagated,
    propagated,
    spread,
)
from lgp.models.classifier_folder import Head
from lgp.params.evaluate import PropagationParams

RNG = np.random.default_rng(0)
IMAGES, CLASSES = 90, 3


@pytest.fixture
def x() -> np.ndarray:
    return make_blobs(IMAGES, 5, centers=CLASSES, cluster_std=6.0, random_state=0)[0].astype(np.float32)


@pytest.fixture
def y_known() -> np.ndarray:
    y = make_blobs(IMAGES, 5, centers=CLASSES, cluster_std=6.0, random_state=0)[1].astype(np.int64)
    return np.where(np.arange(IMAGES) < 12, y, -1)


def one_hot(y: np.ndarray) -> np.ndarray:
    return (y[:, None] == np.arange(CLASSES)).astype(float)


def slow_affinity(x: np.ndarray, k: int, gamma: float) -> np.ndarray:
    directed = np.zeros((len(x), len(x)))
    for i, image in enumerate(x):
        cosines = [float(image @ other / np.linalg.norm(image) / np.linalg.norm(other)) for other in x]
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosines[j])
        for j in others[:k]:
            directed[i, j] = max(cosines[j], 0.0) ** gamma
    return directed + directed.T


def slow_scores(weights: np.ndarray, known: np.ndarray, alpha: float) -> np.ndarray:
    degree = weights.sum(1)
    root = np.diag([d**-0.5 if d else 1.0 for d in degree])
    return np.linalg.solve(np.eye(len(weights)) - alpha * root @ weights @ root, known)


@pytest.mark.parametrize(("k", "gamma"), [(1, 1.0), (4, 3.0), (89, 2.0), (500, 2.0)])
def test_affinity_equals_a_loop_over_pairs(
    x: np.ndarray, k: int, gamma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgp.features.knn.QUERIES", 7)
    monkeypatch.setattr("lgp.features.knn.CANDIDATES", 13)
    found = affinity(find_neighbours(x, k), k, gamma).toarray()
    assert found == pytest.approx(slow_affinity(x.astype(np.float64), k, gamma), abs=1e-5)


def test_neighbours_of_a_smaller_k_are_the_first_of_a_larger_one(x: np.ndarray) -> None:
    many, few = affinity(find_neighbours(x, 20), 4, 3.0), affinity(find_neighbours(x, 4), 4, 3.0)
    assert np.array_equal(many.toarray(), few.toarray())


def test_more_neighbours_than_were_searched_for_are_refused(x: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        affinity(find_neighbours(x, 3), 4, 1.0)


def test_equal_images_are_neighbours_but_none_is_its_own() -> None:
    neighbours = find_neighbours(np.ones((6, 4), dtype=np.float32), 2)
    assert neighbours.rows.shape == (6, 2)
    assert (neighbours.rows != np.arange(6)[:, None]).all()
    assert all(len(set(row)) == 2 for row in neighbours.rows)


@pytest.mark.parametrize("alpha", [0.5, 0.99, 0.999])
def test_scores_equal_the_dense_solution(x: np.ndarray, y_known: np.ndarray, alpha: float) -> None:
    weights = affinity(find_neighbours(x, 6), 6, 3.0)
    expected = slow_scores(weights.toarray(), one_hot(y_known), alpha)
    assert np.abs(spread(weights, one_hot(y_known), alpha) - expected).max() < 2e-9


@pytest.mark.parametrize("alpha", [0.5, 0.95])
def test_labels_and_shares_equal_scikit_learns_label_spreading(
    x: np.ndarray, y_known: np.ndarray, alpha: float
) -> None:
    weights = affinity(find_neighbours(x, 6), 6, 3.0)
    theirs = LabelSpreading(kernel=lambda *_: weights.toarray(), alpha=alpha, max_iter=2000, tol=1e-10)
    theirs.fit(x, y_known)
    ours, known = propagated(weights, y_known, CLASSES, alpha, "none"), y_known >= 0
    scores = spread(weights, one_hot(y_known), alpha)
    assert scores / scores.sum(1, keepdims=True) == pytest.approx(theirs.label_distributions_, abs=1e-6)
    assert np.array_equal(ours.labels[~known], theirs.transduction_[~known])
    assert np.array_equal(ours.labels[known], y_known[known])


@pytest.mark.parametrize("balance", ["none", "equal"])
def test_label_and_confidence_equal_their_definition(x: np.ndarray, y_known: np.ndarray, balance: str) -> None:
    weights = affinity(find_neighbours(x, 6), 6, 3.0)
    scores = slow_scores(weights.toarray(), one_hot(y_known), 0.9)
    found = propagated(weights, y_known, CLASSES, 0.9, balance)  # type: ignore[arg-type]
    for i in np.flatnonzero(y_known < 0):
        mass = [scores[i, c] / (sum(scores[:, c]) if balance == "equal" else 1) for c in range(CLASSES)]
        shares = [value / sum(mass) for value in mass]
        entropy = -sum(share * np.log(share) for share in shares)
        assert found.labels[i] == int(np.argmax(shares))
        assert found.confidence[i] == pytest.approx(1 - entropy / np.log(CLASSES), abs=1e-6)
    assert (found.confidence[y_known >= 0] == 1).all()
    assert ((found.confidence >= 0) & (found.confidence <= 1)).all()


def test_balance_keeps_a_class_with_more_labels_from_taking_over() -> None:
    # a ring of 40 images; class 1 has three labels, class 0 one
    ring = sparse.csr_array(np.roll(np.eye(40), 1, axis=1) + np.roll(np.eye(40), -1, axis=1))
    y_known = np.full(40, -1)
    y_known[[0, 18, 20, 22]] = [0, 1, 1, 1]
    taken = {balance: propagated(ring, y_known, 2, 0.99, balance).labels.sum() for balance in ("none", "equal")}
    assert taken["equal"] == pytest.approx(20, abs=1)
    assert taken["none"] > taken["equal"] + 5


def test_images_that_no_label_reaches_have_no_label_and_no_confidence() -> None:
    two_pairs_and_one = np.zeros((5, 5))
    two_pairs_and_one[[0, 1, 2, 3], [1, 0, 3, 2]] = 1
    found = propagated(sparse.csr_array(two_pairs_and_one), np.array([0, 1, -1, -1, -1]), 2, 0.9, "equal")
    assert found.labels.tolist() == [0, 1, -1, -1, -1]
    assert found.confidence.tolist() == [1, 1, 0, 0, 0]


def test_labels_that_are_surely_reached_have_full_confidence() -> None:
    pairs = np.kron(np.eye(2), [[0, 1], [1, 0]])
    found = propagated(sparse.csr_array(pairs), np.array([0, -1, 2, -1]), 3, 0.9, "none")
    assert (found.labels.tolist(), found.confidence.tolist()) == ([0, 0, 2, 2], [1, 1, 1, 1])


@pytest.mark.parametrize(("y_known", "found"), [([-1, -1], 0), ([-1, 1], 1)])
def test_labels_of_fewer_than_two_classes_are_an_error(y_known: list[int], found: int) -> None:
    with pytest.raises(LgpError, match=f"labels of {found} classes, and needs two"):
        propagated(sparse.csr_array(1 - np.eye(2)), np.array(y_known), 2, 0.9, "none")


def test_classifier_is_scikit_learns_weighted_by_confidence(x: np.ndarray) -> None:
    labels, confidence = RNG.integers(0, 3, IMAGES), RNG.random(IMAGES)
    labels[:5], confidence[:5] = -1, 0.0
    sure = np.where(labels < 0, -1, (labels + 1) % 3), np.where(labels < 0, 0.0, 1.0)
    (ours, first), (other, second) = fit_to_propagated(x, [Propagated(labels, confidence), Propagated(*sure)], 4, 0.1)
    assert (first, second) == (True, True)
    theirs = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000)
    theirs.fit(x[5:].astype(np.float64), labels[5:], sample_weight=confidence[5:])
    assert softmax(ours.logits(x), axis=1)[:, :3] == pytest.approx(theirs.predict_proba(x), abs=1e-4)
    assert (ours.logits(x)[:, 3] == -1e4).all()
    theirs.fit(x[5:].astype(np.float64), sure[0][5:])
    assert softmax(other.logits(x), axis=1)[:, :3] == pytest.approx(theirs.predict_proba(x), abs=1e-4)


def accuracy(head: Head, x: np.ndarray, y: np.ndarray) -> float:
    return float((head.logits(x).argmax(1) == y).mean())


def digits(seed: int) -> dict[str, np.ndarray]:
    """Return 400 digits to train on, one of each class with its label, 143 of val and 360 of test; raw pixels."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x, y = ((x[order] - 5) / 6).astype(np.float32), y[order]
    few = [rng.choice(np.flatnonzero(y[:400] == label)) for label in range(10)]
    y_known = np.full(400, -1)
    y_known[few] = y[few]
    parts = {"val": slice(400, 543), "test": slice(543, 903)}
    ends = {f"{kind}_{part}": of[rows] for part, rows in parts.items() for kind, of in (("x", x), ("y", y))}
    return {"x": x[:400], "y_known": y_known} | ends


def test_choice_is_the_first_of_the_best_on_val() -> None:
    of = digits(0)
    params = PropagationParams(k=[3, 10], alpha=[0.5, 0.99], c=0.01, gamma=2, balance="none")
    neighbours = find_neighbours(of["x"], 10)
    scores = {}
    for k in (3, 10):
        for alpha in (0.5, 0.99):
            labels = propagated(affinity(neighbours, k, 2), of["y_known"], 10, alpha, "none")
            ((head, _),) = fit_to_propagated(of["x"], [labels], 10, 0.01)
            scores[k, alpha] = accuracy(head, of["x_val"], of["y_val"])
    best = max(scores, key=lambda pair: scores[pair])
    assert len(set(scores.values())) > 1
    chosen = choose_propagation(neighbours, of["x"], of["y_known"], of["x_val"], of["y_val"], 10, params)
    assert ((chosen.k, chosen.alpha), chosen.val) == (best, scores[best])
    assert accuracy(chosen.head, of["x_val"], of["y_val"]) == chosen.val
    assert np.array_equal(
        chosen.propagated.labels,
        propagated(affinity(neighbours, best[0], 2), of["y_known"], 10, best[1], "none").labels,
    )


def test_equal_candidates_give_the_first() -> None:
    of = digits(1)
    neighbours = find_neighbours(of["x"], 8)
    params = PropagationParams(k=[8, 5], alpha=[0.95, 0.9])
    easy = of["x"][of["y_known"] >= 0], of["y_known"][of["y_known"] >= 0]  # all candidates know the labelled images
    chosen = choose_propagation(neighbours, of["x"], of["y_known"], *easy, 10, params)
    assert (chosen.val, chosen.k, chosen.alpha) == (1.0, 8, 0.95)


def test_empty_validation_part_is_an_error(x: np.ndarray, y_known: np.ndarray) -> None:
    with pytest.raises(LgpError, match=r"val has no image.*raise data.val_share"):
        choose_propagation(find_neighbours(x, 20), x, y_known, x[:0], y_known[:0], CLASSES, PropagationParams())


def test_propagation_beats_logistic_regression_on_ten_labelled_digits() -> None:
    ahead = []
    for seed in range(3):
        of = digits(seed)
        neighbours, few = find_neighbours(of["x"], 10), of["y_known"] >= 0
        params = PropagationParams(k=[5], alpha=[0.95])
        chosen = choose_propagation(neighbours, of["x"], of["y_known"], of["x_val"], of["y_val"], 10, params)
        alone = LogisticRegression(max_iter=5000).fit(of["x"][few].astype(np.float64), of["y_known"][few])
        ahead.append(accuracy(chosen.head, of["x_test"], of["y_test"]) - alone.score(of["x_test"], of["y_test"]))
    assert np.mean(ahead) > 0.05
