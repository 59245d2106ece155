"""Evaluation with few labels: a linear classifier on frozen features of each subset, or on propagated labels.

The strength of the regularisation is chosen by cross-validation within the labelled images or on the validation part,
or it is fixed. Test labels choose nothing. The temperature of the probabilities is found by cross-validation too, or on
val where a class has a single labelled image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold

from lgp.errors import LgpError
from lgp.evaluate.logistic import MAX_ITER, MEMORY, fit_logistic
from lgp.evaluate.outcome import CALIBRATED_ON, Logits, Outcome, Scored, best_on_val, over_subsets, usable_temperature
from lgp.evaluate.propagation import UNKNOWN, choose_propagation, find_neighbours
from lgp.evaluate.regression import Problems, Regressions
from lgp.evaluate.ridge import fit_ridge
from lgp.features.cache import Features, Standardizer, normalizer, standardizer
from lgp.models.classifier_folder import Classifier, Head
from lgp.params.evaluate import FeatureParams, FewShotParams, PropagationParams

Scale = Callable[[np.ndarray], np.ndarray]
SCALINGS: dict[str, Callable[..., Scale]] = {"standardized": standardizer, "normalized": normalizer}
METHODS: dict[str, Callable[[Problems, Iterable[float]], Iterator[Regressions]]] = {
    "logistic": fit_logistic,
    "ridge": fit_ridge,
}
TOGETHER = 2**27  # numbers that the features of subsets which are fitted together, and what is computed of them, have


@dataclass(frozen=True)
class Images:
    """Scaled features (N, D), and class indices (N,)."""

    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """The classifier of a subset.

    Attributes:
        head: on scaled features, with a logit for each class.
        c: the inverse strength that was chosen.
        converged: whether the classifier is the optimum.
        temperature: by cross-validation. None: val must find it, for C was chosen on val, a class has a single image,
            or there are fewer than `CALIBRATED_ON` images.
    """

    head: Head
    c: float
    converged: bool
    temperature: float | None


def evaluate_fewshot(
    features: Features, subsets: list[np.ndarray], params: FewShotParams, device: torch.device | None = None
) -> Outcome:
    """Fit a linear classifier to each few-label subset.

    Args:
        features: frozen features of the encoder.
        subsets: arrays of image ids, all within the training part.
        params: scaling, method, and how the strength is chosen.
        device: where to compute; the CPU unless given.

    Raises:
        LgpError: a subset has one class alone.
    """
    scale = scale_of(features, params)
    rows = [_rows_of(features, ids) for ids in subsets]
    labelled = [Images(scale(features.x["train"][of]), features.y["train"][of]) for of in rows]
    val = Images(scale(features.x["val"]), features.y["val"]) if params.choose == "validation" else None
    fitted = fit_few_labels(labelled, val, features.classes, params, device)
    outcome = _over([_scored(of.head, scale, features, of.temperature) for of in fitted], len(subsets[0]))
    more = {"c": float(np.median([of.c for of in fitted]))} | _unconverged([of.converged for of in fitted])
    return replace(outcome, metrics=outcome.metrics | more)


def _unconverged(converged: Sequence[bool]) -> dict[str, float]:
    """Return the metric of regressions that did not converge, and warn of them."""
    stopped = converged.count(False)
    if stopped:
        print(f"warning: {stopped} of {len(converged)} regressions stopped after {MAX_ITER} steps, not converged")
    return {"unconverged": float(stopped)}


def evaluate_propagation(
    features: Features,
    subsets: list[np.ndarray],
    fewshot: FewShotParams,
    propagation: PropagationParams,
    device: torch.device,
) -> Outcome:
    """Spread the labels of each subset to all training images, and fit logistic regression to these.

    The graph has the training images, labelled or not, and no other. Val chooses its neighbours, and how far labels
    spread.

    Args:
        features: frozen features of the encoder.
        subsets: arrays of image ids, all within the training part.
        fewshot: scaling.
        propagation: what to try.
        device: where neighbours are searched, and the classifiers fitted.

    Raises:
        LgpError: there is no validation image, or a subset has one class alone.
    """
    scale = scale_of(features, fewshot)
    x_all = np.concatenate([scale(features.x[part]) for part in ("train", "unlabeled")])
    x_val = scale(features.x["val"])
    neighbours = find_neighbours(x_all, max(propagation.k), device)
    fitted, chosen = [], []
    for ids in subsets:
        rows = _rows_of(features, ids)
        known = np.full(len(x_all), UNKNOWN)
        known[rows] = features.y["train"][rows]
        found = choose_propagation(
            neighbours, x_all, known, x_val, features.y["val"], features.classes, propagation, device
        )
        chosen.append(found)
        fitted.append(_scored(found.head, scale, features, None))
    outcome = _over(fitted, len(subsets[0]))
    more = {
        "k": float(np.median([c.k for c in chosen])),
        "alpha": float(np.median([c.alpha for c in chosen])),
        "unlabelled": float(len(x_all) - len(subsets[0])),
        **_unconverged([of.converged for of in chosen]),
    }
    return replace(outcome, metrics=outcome.metrics | more)


def _rows_of(features: Features, ids: np.ndarray) -> np.ndarray:
    """Return the rows of a subset's images in the training part. Raise `LgpError` if they are of one class."""
    rows = np.searchsorted(features.ids["train"], ids)
    if len(np.unique(features.y["train"][rows])) < 2:
        raise LgpError(
            f"a few-label subset of {len(ids)} images has one class alone, and a classifier needs two: take more "
            "labels, or as many of each class (labels.shares, labels.shots, labels.lists)"
        )
    return rows


def scale_of(features: Features, params: FewShotParams) -> Scale:
    """Return the scaling of features, measured on all training images: it needs no labels."""
    return SCALINGS[params.scaling](features.x["train"], features.x["unlabeled"])


def _scored(head: Head, scale: Scale, features: Features, temperature: float | None) -> tuple[Scored, Classifier]:
    """Score a head on scaled features, and return it as a classifier of the encoder's own features.

    Args:
        head: with a logit for each class.
        scale: of the features that it was fitted to.
        features: of the encoder.
        temperature: of its probabilities. None: the one that val asks for.
    """
    of_splits = {split: head.logits(scale(features.x[split])) for split in ("val", "test")}
    logits = Logits(of_splits, features.y, features.ids)
    if temperature is None:
        temperature = logits.temperature_on_val()
    kept = _on_raw(head, scale, features.params).divided_by(temperature)
    return logits.scored(temperature), Classifier(temperature, kept)


def _over(fitted: Sequence[tuple[Scored, Classifier]], labels: int) -> Outcome:
    """Summarise the classifiers of all subsets, of `labels` images each. The best on val is kept."""
    scored = [scores for scores, _ in fitted]
    return over_subsets(scored, labels, fitted[best_on_val(scored)][1])


def fit_few_labels(
    labelled: Sequence[Images],
    val: Images | None,
    classes: int,
    params: FewShotParams,
    device: torch.device | None = None,
) -> list[Fitted]:
    """Fit a classifier to each subset of labelled images, with the C of `params.c_grid` that is the best.

    Val says which is the best, or cross-validation, which needs two images of every class. With fewer, and where
    `params.choose` is `fixed`, C is `params.c_fixed`. Of equally good strengths the first is taken. Subsets of one size
    are fitted together, as far as memory allows.

    Args:
        labelled: the subsets.
        val: chooses C. None: it has no part in the choice.
        classes: K.
        params: method, and how the strength is chosen.
        device: where to compute; the CPU unless given.

    Returns:
        The classifiers, in the order of the subsets. C is scikit-learn's inverse strength: 1 / (N · λ) for a mean loss
        with the penalty λ/2 · |w|². The paper's λ of 0.00025 / N is C = 4000.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for number, of in enumerate(labelled):
        alike.setdefault((len(of.y), _folds(of.y, params)), []).append(number)
    found: dict[int, Fitted] = {}
    for (images, folds), numbers in alike.items():
        width = labelled[0].x.shape[1]
        each = images * width + 3 * MEMORY * (folds + 1) * min(images, width) * classes
        sets = max(TOGETHER // each, 1)
        for start in range(0, len(numbers), sets):
            part = numbers[start : start + sets]
            of_part = _fitted([labelled[number] for number in part], folds, val, classes, params, device)
            found |= zip(part, of_part, strict=True)
    return [found[number] for number in range(len(labelled))]


def _fitted(
    labelled: Sequence[Images],
    folds: int,
    val: Images | None,
    classes: int,
    params: FewShotParams,
    device: torch.device | None,
) -> list[Fitted]:
    """Fit classifiers to subsets of one size, each to all images and to all but those of a fold."""
    x, y = np.stack([of.x for of in labelled]), np.stack([of.y for of in labelled])
    crossed = val is None and folds > 1 and params.choose != "fixed"
    calibrated = val is None and folds > 1 and len(y[0]) >= CALIBRATED_ON
    kept = np.stack([_kept(of, folds if calibrated or crossed else 0) for of in labelled])  # (S, folds + 1, N)
    problems = Problems(x, np.broadcast_to(y[:, None], kept.shape), kept, classes, params.intercept, device)
    grid = params.c_grid if crossed or val is not None else [params.c_fixed]
    best: dict[int, tuple[float, Fitted]] = {}
    for c, found in zip(grid, METHODS[params.method](problems, grid), strict=True):
        for number, of in enumerate(labelled):
            head, folds_of = found.head(number, -1), ~kept[number, :-1]
            logits = np.zeros((len(of.y), classes))  # of each image by the fold that left it out
            for fold, left_out in enumerate(folds_of):
                logits[left_out] = found.head(number, fold).logits(of.x[left_out])
            if val is not None:
                score = _accuracy(head.logits(val.x), val.y)
            else:
                score = float(np.mean([_accuracy(logits[out], of.y[out]) for out in folds_of])) if crossed else 0.0
            if number not in best or score > best[number][0]:
                temperature = usable_temperature(logits, of.y) if calibrated else None
                best[number] = score, Fitted(head, c, bool(found.converged[number, -1]), temperature)
    return [best[number][1] for number in range(len(labelled))]


def _accuracy(logits: np.ndarray, y: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == y).mean())


def _folds(y: np.ndarray, params: FewShotParams) -> int:
    """Return the number of folds: each must have an image of every class."""
    return min(params.folds, int(np.bincount(y)[np.unique(y)].min()))


def _kept(labelled: Images, folds: int) -> np.ndarray:
    """Return which images each fold keeps, (folds + 1, N) bool; the last one keeps all.

    Folds are not shuffled: the subsets are random already.
    """
    kept = np.ones((folds + 1, len(labelled.y)), dtype=bool)
    if folds:
        for fold, (_, left_out) in enumerate(StratifiedKFold(folds).split(labelled.x, labelled.y)):
            kept[fold, left_out] = False
    return kept


def _on_raw(head: Head, scale: Scale, pooling: FeatureParams) -> Head:
    """Return a head on scaled features as one on the encoder's own."""
    if isinstance(scale, Standardizer):
        head = head.on_unscaled(scale.mean, scale.std)
    return replace(head, pool=pooling.pool, blocks=pooling.blocks, normalized=not isinstance(scale, Standardizer))
