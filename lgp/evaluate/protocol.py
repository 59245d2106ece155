"""The label-efficiency protocol: one encoder's features in, metrics and predictions out.

Test labels decide nothing: with all labels the regularisation is chosen on the validation part, with few
by cross-validation within the labelled images, or fixed where a class has a single one.
"""

from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline

from lgp.evaluate.features import Features
from lgp.evaluate.knn import knn_predict
from lgp.evaluate.outcome import Outcome
from lgp.params import FewShotParams, LinearParams

Classifier = Any  # of scikit-learn, with fit, predict and predict_proba

MAX_ITER = 5000
# few images are separable: at scikit-learn's 1e-4 and in single precision the weights depend on the solver's path
FEWSHOT_TOL = 1e-6
TOP5_FROM = 10  # classes from which on top-5 says something


def evaluate_linear(features: Features, params: LinearParams) -> Outcome:
    """Logistic regression with all training labels, its strength C chosen on val, and k-NN beside it."""
    x, y = features.x, features.y
    models = [_regression(c).fit(x["train"], y["train"]) for c in params.c_grid]
    val = [float(model.score(x["val"], y["val"])) for model in models]
    best = int(np.argmax(val))
    knn = {
        split: knn_predict(x["train"], y["train"], x[split], features.classes, params.knn_k, params.knn_temperature)
        for split in ("val", "test")
    }
    metrics = {
        **_scores(models[best], features),
        "test/knn_top1": _percent(knn["test"] == y["test"]),
        "val/knn_top1": _percent(knn["val"] == y["val"]),
        "labels": float(len(y["train"])),
        "c": params.c_grid[best],
    }
    predictions = _prediction_table(features, models[best].predict(x["test"]), subset=0)
    return Outcome(metrics, predictions)


def evaluate_fewshot(features: Features, subsets: list[np.ndarray], params: FewShotParams) -> Outcome:
    """Logistic regression on each few-label subset; mean, deviation and every subset's accuracy.

    Args:
        features: of the encoder.
        subsets: arrays of image ids, all within the training part.
        params: the grid of strengths, the fixed one for single-image classes, folds.
    """
    scores, tables, chosen = [], [], []
    for number, ids in enumerate(subsets):
        rows = np.searchsorted(features.ids["train"], ids)
        model, c = _fit_fewshot(features.x["train"][rows], features.y["train"][rows], params)
        scores.append(_scores(model, features))
        tables.append(_prediction_table(features, model.predict(features.x["test"]), number))
        chosen.append(c)
    metrics: dict[str, float] = {}
    for name in scores[0]:
        values = [s[name] for s in scores]
        metrics |= {name: round(float(np.mean(values)), 4), f"{name}_std": round(float(np.std(values, ddof=1)), 4)}
    for number, score in enumerate(scores):
        metrics |= {f"test/top1_subset{number}": score["test/top1"]}
    metrics |= {"labels": float(len(subsets[0])), "subsets": float(len(subsets)), "c": float(np.median(chosen))}
    return Outcome(metrics, pd.concat(tables, ignore_index=True))


def _fit_fewshot(x: np.ndarray, y: np.ndarray, params: FewShotParams) -> tuple[Classifier, float]:
    """Fit with C from cross-validation where every class has two images or more, else with `c_single`.

    With more features than images the features are first rotated into the span of the images (PCA, nothing
    dropped): an L2-penalised linear model has its weights in that span, so it stays the same, and is found faster.
    """
    x = x.astype(np.float64)
    folds = min(params.folds, int(np.bincount(y)[np.unique(y)].min()))
    model: Classifier = _regression(params.c_single, FEWSHOT_TOL)
    if folds >= 2:
        # unshuffled folds: the subsets are random already, and nothing is left to chance
        model = GridSearchCV(_regression(1.0, FEWSHOT_TOL), {"C": params.c_grid}, cv=StratifiedKFold(folds))
    rotated = [PCA(svd_solver="full")] if x.shape[1] > x.shape[0] else []
    pipeline = make_pipeline(*rotated, model).fit(x, y)
    return pipeline, float(model.best_params_["C"] if folds >= 2 else params.c_single)


def _regression(c: float, tol: float = 1e-4) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=MAX_ITER, tol=tol)


def _scores(model: Classifier, features: Features) -> dict[str, float]:
    scores = {}
    for split in ("test", "val"):
        x, y = features.x[split], features.y[split]
        scores[f"{split}/top1"] = _percent(model.predict(x) == y)
    if features.classes >= TOP5_FROM and len(model.classes_) == features.classes:
        probabilities = model.predict_proba(features.x["test"])
        top5 = top_k_accuracy_score(features.y["test"], probabilities, k=5, labels=np.arange(features.classes))
        scores["test/top5"] = round(100 * float(top5), 4)
    return scores


def _percent(correct: np.ndarray) -> float:
    return round(100 * float(np.mean(correct)), 4)


def _prediction_table(features: Features, predicted: np.ndarray, subset: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "subset": subset,
            "id": features.ids["test"],
            "label": features.y["test"],
            "prediction": predicted.astype(np.int64),
        }
    )
