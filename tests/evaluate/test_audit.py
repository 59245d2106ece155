"""Labels that look wrong: confident learning against a slow reference, and what no judgement of an image may use."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression

from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.evaluate import audit as module
from lgp.evaluate.audit import (
    Judged,
    _groups,
    check_auditable,
    confident_errors,
    contradictions,
    judge,
    label_scores,
    out_of_fold,
    outlier_scores,
)
from lgp.evaluate.few_labels import Images
from lgp.evaluate.regression import Problems
from lgp.features.cache import Features
from lgp.params.evaluate import FeatureParams, FewShotParams

CLASSES, TRAIN, HELD_OUT = 3, 120, 30
CPU = torch.device("cpu")
FIXED = FewShotParams.model_validate(
    {"scaling": "standardized", "choose": "fixed", "c_grid": [1], "c_fixed": 1.0, "folds": 2}
)


@pytest.fixture
def features() -> Features:
    """Three classes of 120 training images and 30 of val and of test, which their features tell apart."""
    x, y = make_blobs(TRAIN + 2 * HELD_OUT, 4, centers=8 * np.eye(CLASSES, 4), random_state=0)
    x = x.astype(np.float32)
    ends = {"train": (0, TRAIN), "val": (TRAIN, TRAIN + HELD_OUT), "test": (TRAIN + HELD_OUT, len(x))}
    parts = {part: np.arange(*of) for part, of in ends.items()} | {"unlabeled": np.arange(0)}
    return Features(
        {part: x[ids] for part, ids in parts.items()},
        {part: y[ids] for part, ids in parts.items()},
        parts,
        CLASSES,
        {},
        FeatureParams(),
    )


def flipped(features: Features, part: str, rows: list[int]) -> Features:
    """Return features with the labels of some images of a part changed to the next class."""
    labels = features.y[part].copy()
    labels[rows] = (labels[rows] + 1) % CLASSES
    return replace(features, y={**features.y, part: labels})


def flagged(features: Features) -> np.ndarray:
    """Return the rows of train, val and test whose labels look wrong, in this order."""
    judged = judge(features, np.arange(TRAIN), FIXED, seed=0)
    labels = np.concatenate([features.y[part] for part in module.PARTS])
    return np.flatnonzero(~np.isnan(label_scores(judged, labels, TRAIN)))


def off_diagonal(labels: np.ndarray, probabilities: np.ndarray) -> list[bool]:
    """The paper's count: which images are confidently of another class than their label."""
    thresholds = [np.mean([p[c] for p, y in zip(probabilities, labels, strict=True) if y == c]) for c in range(CLASSES)]
    wrong = []
    for p, y in zip(probabilities, labels, strict=True):
        confident = [c for c in range(CLASSES) if p[c] >= thresholds[c]]
        likely = max(confident, key=lambda c: p[c]) if confident else y
        wrong.append(likely != y)
    return wrong


def test_errors_are_the_off_diagonal_of_the_papers_confident_joint() -> None:
    pytest.importorskip("cleanlab")
    random = np.random.default_rng(0)
    truth = random.integers(0, CLASSES, 400)
    labels = np.where(random.random(400) < 0.2, random.integers(0, CLASSES, 400), truth)
    sharpness = np.array([2.0, 4.0, 8.0])[truth]  # one class is known less well than another
    probabilities = np.array(
        [random.dirichlet(1 + s * np.eye(CLASSES)[c]) for s, c in zip(sharpness, truth, strict=True)]
    )
    thresholds = np.array([probabilities[labels == c, c].mean() for c in range(CLASSES)])
    best = probabilities.argmax(axis=1)
    several = (probabilities >= thresholds).sum(axis=1) > 1
    # where cleanlab deviates, as its docstring says: a label that is the most probable class stays, and of several
    # confident classes the most probable class of all counts
    deviates = (best == labels) | (several & (probabilities.max(axis=1) < thresholds[best]))
    found, expected = confident_errors(labels, probabilities), np.array(off_diagonal(labels, probabilities))
    assert np.array_equal(found[~deviates], expected[~deviates])
    assert not found[best == labels].any()
    assert 30 < expected[~deviates].sum() < (best != labels).sum()  # more than what is merely predicted otherwise


def test_flipped_labels_are_found_in_each_part(features: Features) -> None:
    pytest.importorskip("cleanlab")
    flips = {"train": [3, 30, 77, 111], "val": [4], "test": [9, 20]}
    noisy = features
    for part, rows in flips.items():
        noisy = flipped(noisy, part, rows)
    wrong = {*flips["train"], TRAIN + 4, TRAIN + HELD_OUT + 9, TRAIN + HELD_OUT + 20}
    found = set(flagged(noisy).tolist())
    assert found <= wrong
    assert found >= {*flips["train"], TRAIN + 4}
    assert len(found) >= len(wrong) - 1  # confident learning leaves out what it is not confident of


def test_judgement_of_training_images_does_not_depend_on_val_and_test(features: Features) -> None:
    pytest.importorskip("cleanlab")
    noisy = flipped(features, "train", [3, 30])
    other = flipped(flipped(noisy, "val", list(range(20))), "test", list(range(25)))
    of_both = [judge(f, np.arange(TRAIN), FIXED, seed=0).probabilities for f in (noisy, other)]
    assert np.array_equal(*of_both)
    assert flagged(noisy)[:2].tolist() == [3, 30]
    assert flagged(other)[flagged(other) < TRAIN].tolist() == [3, 30]


def test_thresholds_of_training_images_are_their_own() -> None:
    pytest.importorskip("cleanlab")
    # the last training image is less probably of class 0 than those that have the label 0 in train, but not in all
    of_first = np.array([0.9, 0.9, 0.9, 0.1, 0.1, 0.6, 0.1, 0.1, 0.1])
    judged = Judged(np.stack([of_first, 1 - of_first], axis=1), np.ones(9, dtype=bool))
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0])
    assert np.flatnonzero(~np.isnan(label_scores(judged, labels, 6))).tolist() == [6, 7, 8]
    assert 5 in np.flatnonzero(~np.isnan(label_scores(judged, labels, 9)))


def test_probability_of_an_image_comes_from_a_regression_that_saw_no_image_of_its_group() -> None:
    # two copies of 20 images that have nothing in common: only who saw one of both knows their label
    x, y = np.repeat(10 * np.eye(20), 2, axis=0), np.repeat(np.arange(20) % 2, 2)

    def of_label(groups: np.ndarray) -> np.ndarray:
        judged = out_of_fold(Images(x, y), groups, 2, 1.0, True, seed=0)
        assert judged.seen.all()
        return judged.probabilities[np.arange(40), y]

    assert of_label(np.repeat(np.arange(20), 2)).max() < 0.7
    assert of_label(np.arange(40)).max() > 0.9  # copies in other folds tell


def test_every_fold_is_judged_with_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.arange(50, dtype=np.float64)[:, None] / 50, np.arange(50) % 2
    learnt: list[np.ndarray] = []

    def watched(x: np.ndarray, y: np.ndarray, kept: np.ndarray, *others: Any) -> Problems:
        learnt.extend(kept[0])
        return Problems(x, y, kept, *others)

    monkeypatch.setattr(module, "Problems", watched)
    judged = out_of_fold(Images(x, y), np.arange(50), 2, 1.0, True, seed=0)
    assert [kept.sum() for kept in learnt] == [40] * 5
    assert (np.sum(learnt, axis=0) == 4).all()
    assert np.allclose(judged.probabilities.sum(axis=1), 1)
    for kept in learnt:
        model = LogisticRegression(C=1.0, tol=1e-10).fit(x[kept], y[kept])
        assert judged.probabilities[~kept] == pytest.approx(model.predict_proba(x[~kept]), abs=1e-5)


def test_image_whose_class_the_regression_never_saw_is_not_judged() -> None:
    pytest.importorskip("cleanlab")
    x, y = make_blobs([20, 20, 6], 2, centers=[[0, 9], [9, 0], [9, 9]], random_state=0)
    groups = np.where(y == 2, 99, np.arange(46))  # the third class is one group
    x, y, groups = np.concatenate([x, [[-9, -9]]]), np.append(y, 3), np.append(groups, 100)  # the fourth is one image
    judged = out_of_fold(Images(x, y), groups, 4, 1.0, True, seed=0)
    assert np.array_equal(judged.seen, y < 2)
    assert np.isnan(label_scores(judged, y, len(y))).all()
    assert judged.suggestion(46, 3) == (None, None)


def test_score_is_how_much_more_probable_another_class_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "confident_errors", lambda labels, probabilities: labels == 1)
    judged = Judged(np.array([[0.7, 0.3], [0.9, 0.1], [0.2, 0.8]]), np.ones(3, dtype=bool))
    assert label_scores(judged, np.array([1, 1, 0]), 2) == pytest.approx([0.4, 0.8, np.nan], nan_ok=True)
    assert judged.suggestion(1, 1) == (0, 0.1)


def test_outliers_are_far_from_their_neighbours(features: Features) -> None:
    unit = {part: x / np.linalg.norm(x, axis=1, keepdims=True) for part, x in features.x.items()}
    x = dict(features.x)
    x["train"], x["test"] = x["train"].copy(), x["test"].copy()
    x["train"][5] = x["test"][7] = -unit["train"].mean(axis=0)
    x["unlabeled"] = features.x["val"][:3]
    found = outlier_scores(replace(features, x=x), CPU)

    known = np.concatenate([x["train"], x["unlabeled"]]).astype(np.float64)
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    means = []
    for part in module.PARTS:
        for row, image in enumerate(x[part].astype(np.float64)):
            distances = 1 - known @ (image / np.linalg.norm(image))
            others = np.delete(distances, row) if part == "train" else distances
            means.append(np.sort(others)[:20].mean())
    lower, median, upper = np.percentile(means[:TRAIN], [25, 50, 75])
    far = np.array(means) > upper + 3 * (upper - lower)
    assert far[[5, TRAIN + HELD_OUT + 7]].all()
    assert found == pytest.approx(np.where(far, np.array(means) / median, np.nan), rel=1e-3, nan_ok=True)


def data_of(labels: list[int], content: list[str], hashes: list[int], groups: list[str | None]) -> LabelledImages:
    index = pd.DataFrame(
        {
            "content": [text.encode() * 32 for text in content],
            "hash": pd.array(hashes, dtype="uint64"),
            "group": pd.array(groups, dtype="str"),
        }
    )
    return cast(LabelledImages, SimpleNamespace(index=index, labels=np.array(labels)))


def test_duplicates_with_different_labels_are_found_and_others_are_not() -> None:
    labels, content = [0, 1, 0, 0, 2, 1, 2], ["a", "a", "a", "b", "c", "d", "e"]
    hashes = [0, 0, 0, 0xFF00, 0xFF03, 0xFFFF0000, 0xFF00FF]  # the fourth and the fifth are 2 bits apart
    data = data_of(labels, content, hashes, [None] * 7)
    near = contradictions(data, np.arange(7), 2)
    assert {image: leak.learnt for image, leak in near.items()} == {0: 1, 1: 0, 2: 1, 3: 4, 4: 3}
    assert module._agreement(near[0]) == 1
    assert module._agreement(near[3]) == 62 / 64
    assert set(contradictions(data, np.arange(7), None)) == {0, 1, 2}
    assert set(contradictions(data, np.array([0, 2, 3, 4]), 2)) == {3, 4}  # the second image is not compared


def test_images_of_one_group_or_of_the_same_pixels_are_left_out_together() -> None:
    groups = _groups(data_of([0] * 5, ["a", "b", "b", "c", "d"], [0] * 5, ["p", None, None, "p", None]))
    assert groups[0] == groups[3]
    assert groups[1] == groups[2]
    assert len(set(groups)) == 3


def test_without_cleanlab_or_labels_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    few = cast(Any, SimpleNamespace(labels=np.array([0, 1]), ids=lambda part: np.arange(2)))
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(LgpError, match="2 training images have a label, no two of them the same: label more"):
        check_auditable(few)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LgpError, match=r"needs cleanlab: pip install 'lgp\[audit\]'"):
        check_auditable(few)


def test_labels_of_one_class_are_not_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    one = cast(Any, SimpleNamespace(labels=np.array([1, 1, 1]), ids=lambda part: np.arange(3)))
    with pytest.raises(LgpError, match="all 3 labelled training images are of one class: label some of another"):
        check_auditable(one)
