"""Evaluation with few labels: logistic regression on frozen features of each subset, or on propagated labels.

The strength of the regularisation is chosen by cross-validation within the labelled images or on the validation part,
or it is fixed. Test labels choose nothing. The temperature of the probabilities is found by cross-validation too, or on
val where a class has a single labelled image.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from lgp.errors import LgpError
from lgp.evaluate.outcome import CALIBRATED_ON, Logits, Outcome, Scored, best_on_val, over_subsets, usable_temperature
from lgp.evaluate.propagation import UNKNOWN, choose_propagation, find_neighbours
from lgp.features.cache import Features, Standardizer, normalizer, standardizer
from lgp.models.classifier_folder import Classifier, Head
from lgp.params.evaluate import FeatureParams, FewShotParams, PropagationParams

Scale = Callable[[np.ndarray], np.ndarray]
Fitted = Any  # a pipeline of scikit-learn, with score and classes_
SCALINGS: dict[str, Callable[..., Scale]] = {"standardized": standardizer, "normalized": normalizer}

MAX_ITER = 5000
# few images are linearly separable; at scikit-learn's 1e-4 in single precision the weights depend on the solver
TOL = 1e-6
NEVER = -1e4  # the logit of a class without a labelled image: its probability is 0 in single precision


def evaluate_fewshot(features: Features, subsets: list[np.ndarray], params: FewShotParams) -> Outcome:
    """Fit logistic regression to each few-label subset.

    Args:
        features: frozen features of the encoder.
        subsets: arrays of image ids, all within the training part.
        params: scaling, and how the strength is chosen.

    Raises:
        LgpError: a subset has one class alone.
    """
    scale = scale_of(features, params)
    x_val = scale(features.x["val"])
    fitted, chosen, unconverged = [], [], 0
    for ids in subsets:
        rows = _rows_of(features, ids)
        x_few, y_few = scale(features.x["train"][rows]), features.y["train"][rows]
        model, c = fit_logistic_regression(x_few, y_few, x_val, features.y["val"], params)
        chosen.append(c)
        unconverged += not _converged(model)
        temperature = _temperature(x_few, y_few, c, features.classes, params)
        fitted.append(_scored(head_of(model, features.classes), scale, features, temperature))
    outcome = _over(fitted, len(subsets[0]))
    if unconverged:
        print(f"warning: {unconverged} of {len(subsets)} regressions stopped after {MAX_ITER} steps, not converged")
    more = {"c": float(np.median(chosen)), "unconverged": float(unconverged)}
    return replace(outcome, metrics=outcome.metrics | more)


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
        device: where neighbours are searched.

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = choose_propagation(
                neighbours, x_all, known, x_val, features.y["val"], features.classes, propagation
            )
        chosen.append(found)
        fitted.append(_scored(head_of([found.classifier], features.classes), scale, features, None))
    outcome = _over(fitted, len(subsets[0]))
    more = {
        "k": float(np.median([c.k for c in chosen])),
        "alpha": float(np.median([c.alpha for c in chosen])),
        "unlabelled": float(len(x_all) - len(subsets[0])),
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


def fit_logistic_regression(
    x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray, params: FewShotParams
) -> tuple[Fitted, float]:
    """Fit logistic regression with the C that `params.choose` selects.

    Cross-validation needs two images of every class; with fewer, C is `params.c_fixed`. With more features than images
    the features are first projected on an orthonormal basis of the images. The weights of an L2-penalised linear model
    lie in their span, with and without an intercept. The model is therefore the same, and is found faster.

    Returns:
        The classifier, and C. C is scikit-learn's inverse strength: 1 / (N · λ) for a mean loss with the penalty
        λ/2 · |w|². The paper's λ of 0.00025 / N is C = 4000.
    """
    x = x.astype(np.float64)
    wide = x.shape[1] > x.shape[0]
    rotated = [FunctionTransformer(_project, kw_args={"basis": np.linalg.qr(x.T)[0]})] if wide else []

    def pipeline(model: Any) -> Fitted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted in the metrics
            return make_pipeline(*rotated, model).fit(x, y)

    def regression(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, fit_intercept=params.intercept, max_iter=MAX_ITER, tol=TOL)

    if params.choose == "validation":
        models = [pipeline(regression(c)) for c in params.c_grid]
        best = int(np.argmax([model.score(x_val, y_val) for model in models]))
        return models[best], params.c_grid[best]
    folds = _folds(y, params)
    if params.choose == "fixed" or folds < 2:
        return pipeline(regression(params.c_fixed)), params.c_fixed
    # the folds are not shuffled: the subsets are random already
    searched = pipeline(GridSearchCV(regression(1.0), {"C": params.c_grid}, cv=StratifiedKFold(folds)))
    return searched, float(searched[-1].best_params_["C"])


def _folds(y: np.ndarray, params: FewShotParams) -> int:
    """Return the number of folds: each must have an image of every class."""
    return min(params.folds, int(np.bincount(y)[np.unique(y)].min()))


def _temperature(x: np.ndarray, y: np.ndarray, c: float, classes: int, params: FewShotParams) -> float | None:
    """Return the temperature by cross-validation within the labelled images.

    None: C was chosen on val, so that the temperature may be too, or a class has a single image.
    """
    folds = _folds(y, params)
    if params.choose == "validation" or folds < 2 or len(y) < CALIBRATED_ON:
        return None
    logits = np.empty((len(y), classes))
    fixed = params.model_copy(update={"choose": "fixed", "c_fixed": c})
    for rest, left_out in StratifiedKFold(folds).split(x, y):
        model, _ = fit_logistic_regression(x[rest], y[rest], x[:0], y[:0], fixed)
        logits[left_out] = head_of(model, classes).logits(x[left_out])
    return usable_temperature(logits, y)


def _project(features: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return the coordinates of features (N, D) in a basis (D, N')."""
    return features @ basis


def _converged(model: Fitted) -> bool:
    fitted = getattr(model[-1], "best_estimator_", model[-1])
    return bool(fitted.n_iter_.max() < MAX_ITER)


def head_of(model: Fitted, classes: int) -> Head:
    """Return a fitted regression as a head on the features that it was fitted to, with a logit for each class.

    Its softmax has the regression's own probabilities. A class without a labelled image gets the logit `NEVER`.
    """
    fitted = getattr(model[-1], "best_estimator_", model[-1])
    weight, bias = fitted.coef_, np.broadcast_to(fitted.intercept_, len(fitted.coef_))
    if len(fitted.classes_) == 2:  # one logit, of the second class
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    if len(model) > 1:
        weight = weight @ model[0].kw_args["basis"].T
    of_all = Head(np.zeros((classes, weight.shape[1])), np.full(classes, NEVER))
    of_all.weight[fitted.classes_], of_all.bias[fitted.classes_] = weight, bias
    return of_all


def _on_raw(head: Head, scale: Scale, pooling: FeatureParams) -> Head:
    """Return a head on scaled features as one on the encoder's own."""
    if isinstance(scale, Standardizer):
        head = head.on_unscaled(scale.mean, scale.std)
    return replace(head, pool=pooling.pool, blocks=pooling.blocks, normalized=not isinstance(scale, Standardizer))
