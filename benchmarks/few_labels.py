"""How long few-label classifiers take: scikit-learn's logistic regression as before, ours, and ridge regression.

    python benchmarks/few_labels.py           # digits: raw pixels, 5 subsets of 10 and of 130 labels
    python benchmarks/few_labels.py --scale   # random features of 1,000 classes, 768 wide; a strength and no folds

All are timed in one process, one after the other, three times (once with --scale). The shortest time counts. It is the
time of the processor, summed over threads, so that other programs of the machine do not count.
"""

import argparse
import resource
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from lgp.evaluate.few_labels import Images, fit_few_labels
from lgp.params.evaluate import FewShotParams

GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1, 10]
PARAMS = {"scaling": "standardized", "choose": "cross_validation", "c_grid": GRID, "c_fixed": 0.1, "folds": 5}


def of_scikit_learn(subsets: Sequence[Images], params: FewShotParams) -> None:
    """Fit as this project did until its own solver: a search over folds, then the folds again for the temperature."""

    def regression(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=5000, tol=1e-6)

    for of in subsets:
        x = of.x.astype(np.float64)
        x = x @ np.linalg.qr(x.T)[0] if x.shape[1] > len(x) else x
        folds = min(params.folds, int(np.bincount(of.y).min()))
        if params.choose == "fixed" or folds < 2:
            regression(params.c_fixed).fit(x, of.y)
            continue
        search = GridSearchCV(regression(1.0), {"C": params.c_grid}, cv=StratifiedKFold(folds)).fit(x, of.y)
        for rest, _ in StratifiedKFold(folds).split(x, of.y):
            regression(search.best_params_["C"]).fit(x[rest], of.y[rest])


def digits(labels: int) -> list[Images]:
    """Return five subsets of standardised pixels, of as many labels of each class."""
    x, y = load_digits(return_X_y=True)
    x, rng = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6), np.random.default_rng(0)
    chosen = [
        np.concatenate([rng.choice(np.flatnonzero(y == k), labels // 10, replace=False) for k in range(10)])
        for _ in range(5)
    ]
    return [Images(x[rows].astype(np.float32), y[rows]) for rows in chosen]


def random_features(images: int, width: int, classes: int) -> list[Images]:
    """Return features that spread as those of encoders do: the variance falls with the number of the direction."""
    rng, y = np.random.default_rng(0), np.arange(images) % classes
    directions = np.linalg.qr(rng.normal(size=(width, width)))[0] * (np.arange(1, width + 1) ** -0.5)[:, None]
    x = (0.5 * rng.normal(size=(classes, width))[y] + rng.normal(size=(images, width))) @ directions
    return [Images(((x - x.mean(0)) / x.std(0)).astype(np.float32), y)]


def measured(name: str, fit: Callable[[], object], times: int) -> None:
    """Print the shortest time of the processor in seconds, and the largest memory of the process so far."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        fit()
        seconds.append(time.process_time() - start)
    print(
        f"{name}: {min(seconds):.3f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB",
        flush=True,
    )


def main() -> None:
    """Time all that the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--images", type=int, default=12_800)
    parser.add_argument("--c", type=float, default=0.1)
    parser.add_argument("--skip-scikit-learn", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    device = torch.device("cpu")
    if args.scale:
        tasks = {f"{args.images} x 768": (random_features(args.images, 768, 1000), 1000)}
        params = PARAMS | {"choose": "validation", "c_grid": [args.c], "c_fixed": args.c}
    else:
        tasks, params = {f"digits, {labels} labels": (digits(labels), 10) for labels in (10, 130)}, PARAMS
    print(f"torch {torch.__version__} on {device.type}, {torch.get_num_threads()} threads")
    for name, (subsets, classes) in tasks.items():
        val = Images(subsets[0].x[:100], subsets[0].y[:100]) if args.scale else None
        for method in ("ridge", "logistic"):
            settings = FewShotParams.model_validate(params | {"method": method})
            again = 1 if args.scale else 3
            measured(
                f"{name}: {method}",
                lambda: fit_few_labels(subsets, val, classes, settings, device),  # noqa: B023 - called at once
                again,
            )
        if not args.skip_scikit_learn:
            fixed = FewShotParams.model_validate(params | ({"choose": "fixed"} if args.scale else {}))
            measured(f"{name}: scikit-learn", lambda: of_scikit_learn(subsets, fixed), again)  # noqa: B023


if __name__ == "__main__":
    main()
