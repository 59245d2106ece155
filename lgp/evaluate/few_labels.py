"""Evaluation with few labels: logistic regression on frozen features of each subset.

The strength of the regularisation is chosen by cross-validation within the labelled images or on the validation part,
or it is fixed. Test labels choose nothing.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from lgp.evaluate.outcome import Outcome, Predicted, over_subsets
from lgp.features.cache import Features, normalizer, standardizer
from lgp.params.evaluate import FewShotParams

Classifier = Any  # of scikit-learn, with fit, score, predict_proba and classes_
SCALINGS = {"standardized": standardizer, "normalized": normalizer}

MAX_ITER = 5000
# few images are linearly separable; at scikit-learn's 1e-4 in single precision the weights depend on the solver
TOL = 1e-6


def evaluate_fewshot(features: Features, subsets: list[np.ndarray], params: FewShotParams) -> Outcome:
    """Fit logistic regression to each few-label subset.

    Args:
        features: frozen features of the encoder.
        subsets: arrays of image ids, all within the training part.
        params: scaling, and how the strength is chosen.
    """
    scale = SCALINGS[params.scaling](features.x["train"])  # scaling needs no labels
    x = {split: scale(features.x[split]) for split in ("val", "test")}
    outcomes, chosen, unconverged = [], [], 0
    for ids in subsets:
        rows = np.searchsorted(features.ids["train"], ids)
        x_few, y_few = scale(features.x["train"][rows]), features.y["train"][rows]
        model, c = fit_logistic_regression(x_few, y_few, x["val"], features.y["val"], params)
        chosen.append(c)
        unconverged += not _converged(model)
        probabilities = {split: _probabilities(model, of_split, features.classes) for split, of_split in x.items()}
        outcomes.append(Predicted(probabilities, features.y, features.ids).scored())
    outcome = over_subsets(outcomes, len(subsets[0]))
    if unconverged:
        print(f"warning: {unconverged} of {len(subsets)} regressions stopped after {MAX_ITER} steps, not converged")
    more = {"c": float(np.median(chosen)), "unconverged": float(unconverged)}
    return Outcome(outcome.metrics | more, outcome.predictions)


def fit_logistic_regression(
    x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray, params: FewShotParams
) -> tuple[Classifier, float]:
    """Fit logistic regression with the C that `params.choose` selects.

    Cross-validation needs two images of every class; with fewer, C is `params.c_fixed`. With more features than images
    the features are first projected on an orthonormal basis of the images. The weights of an L2-penalised linear model
    lie in their span, with and without an intercept. The model is therefore the same, and is found faster.

    Returns:
        The classifier, and C. C is scikit-learn's inverse strength: 1 / (N · λ) for a mean loss with the penalty
        λ/2 · |w|². The paper's λ of 0.00025 / N is C = 4000.
    """
    x = x.astype(np.float64)

    def pipeline(model: Classifier) -> Classifier:
        rotated = [FunctionTransformer(_projection(x))] if x.shape[1] > x.shape[0] else []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted in the metrics
            return make_pipeline(*rotated, model).fit(x, y)

    def regression(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, fit_intercept=params.intercept, max_iter=MAX_ITER, tol=TOL)

    if params.choose == "validation":
        models = [pipeline(regression(c)) for c in params.c_grid]
        best = int(np.argmax([model.score(x_val, y_val) for model in models]))
        return models[best], params.c_grid[best]
    folds = min(params.folds, int(np.bincount(y)[np.unique(y)].min()))
    if params.choose == "fixed" or folds < 2:
        return pipeline(regression(params.c_fixed)), params.c_fixed
    # the folds are not shuffled: the subsets are random already
    searched = pipeline(GridSearchCV(regression(1.0), {"C": params.c_grid}, cv=StratifiedKFold(folds)))
    return searched, float(searched[-1].best_params_["C"])


def _projection(x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the map of features to their coordinates in an orthonormal basis of the rows of `x` (N, D), N < D."""
    basis = np.linalg.qr(x.T)[0]
    return lambda features: features @ basis


def _converged(model: Classifier) -> bool:
    fitted = getattr(model[-1], "best_estimator_", model[-1])
    return bool(fitted.n_iter_.max() < MAX_ITER)


def _probabilities(model: Classifier, x: np.ndarray, classes: int) -> np.ndarray:
    """Return probabilities (N, classes). A class without a labelled image gets 0."""
    probabilities = np.zeros((len(x), classes), dtype=np.float64)
    probabilities[:, model.classes_] = model.predict_proba(x)
    return probabilities
