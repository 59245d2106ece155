"""Logistic and ridge regression, many problems at once: each equals scikit-learn's alone."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge

from lgp.evaluate import logistic, regression
from lgp.evaluate.logistic import fit_logistic
from lgp.evaluate.regression import Problems, Regressions
from lgp.evaluate.ridge import fit_ridge

SETS, IMAGES, WIDTH, CLASSES = 2, 40, 6, 4
STRENGTHS = [1e-4, 1e-2, 1, 100, 4000]
CLOSE = 1e-4  # of weights, intercepts and logits


def random_problems(seed: int = 0, width: int = WIDTH, classes: int = CLASSES) -> tuple[np.ndarray, ...]:
    """Return features, labels and weights of three problems of each of two sets.

    The first has all images, the second leaves a fold out, and the third has other labels and propagation's weights.
    """
    rng = np.random.default_rng(seed)
    y = np.stack([np.tile(np.arange(IMAGES) % classes, (3, 1)), rng.integers(0, classes, (3, IMAGES))])
    x = rng.normal(size=(SETS, IMAGES, width)) * np.linspace(0.2, 3, width) + 1
    x[0] += np.eye(max(width, classes))[y[0, 0]][:, :width]
    weight = np.ones((SETS, 3, IMAGES))
    weight[:, 1, ::5] = 0
    weight[:, 2], y[:, 2] = rng.random((SETS, IMAGES)), (y[:, 2] + 1) % classes
    weight[:, 2, :4], y[:, 2, :4] = 0, -1  # no label reaches these
    return x, y, weight


def logistic_of(c: float, intercept: bool) -> LogisticRegression:
    """Return scikit-learn's with its solver of the second order: the first-order one stops 1e-3 from the optimum."""
    return LogisticRegression(C=c, fit_intercept=intercept, solver="newton-cholesky", tol=1e-12, max_iter=1000)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning", "ignore::scipy.linalg.LinAlgWarning")
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("c", STRENGTHS)
@pytest.mark.parametrize("width", [WIDTH, 60])
def test_every_problem_has_scikit_learns_weights_and_logits(width: int, c: float, intercept: bool) -> None:
    x, y, weight = random_problems(width=width)
    (found,) = fit_logistic(Problems(x, y, weight, CLASSES, intercept), [c])
    assert found.converged.all()
    for s, p in np.ndindex(SETS, 3):
        model = logistic_of(c, intercept)
        used = weight[s, p] > 0
        model.fit(x[s][used], y[s, p][used], sample_weight=weight[s, p][used])
        coef, bias = model.coef_ - model.coef_.mean(0), model.intercept_ - model.intercept_.mean()
        assert np.abs(found.weight[s, p] - coef).max() < CLOSE
        assert np.abs(found.bias[s, p] - found.bias[s, p].mean() - bias).max() < 3 * CLOSE
        logits = found.head(s, p).logits(x[s])
        expected = x[s] @ coef.T + bias
        assert np.abs(logits - logits.mean(1, keepdims=True) - expected).max() < 3 * CLOSE


@pytest.mark.parametrize("intercept", [True, False])
def test_two_classes_have_scikit_learns_single_weight_vector(intercept: bool) -> None:
    """Also where the other problems of the set have more classes."""
    x, y, weight = random_problems()
    y[:, 1] = y[:, 1] % 2 * 2
    for c, found in zip(
        [0.01, 1, 100], fit_logistic(Problems(x, y, weight, CLASSES, intercept), [0.01, 1, 100]), strict=True
    ):
        for s in range(SETS):
            used = weight[s, 1] > 0
            model = LogisticRegression(C=c, fit_intercept=intercept, tol=1e-12, max_iter=5000)
            model.fit(x[s][used], y[s, 1][used])
            of = found.head(s, 1)
            assert np.abs(of.weight[2] - of.weight[0] - model.coef_[0]).max() < CLOSE
            assert np.abs(of.bias[2] - of.bias[0] - model.intercept_).max() < CLOSE


def test_class_without_an_image_in_a_problem_is_impossible() -> None:
    x, y, weight = random_problems()
    weight[1, 0, y[1, 0] == 0] = 0  # the class that stands for no label
    weight[0, 0, y[0, 0] == 3] = 0
    for found in (
        *fit_logistic(Problems(x, y, weight, CLASSES, True), [1]),
        *fit_ridge(Problems(x, y, weight, 5, True), [1]),
    ):
        assert (found.bias[0, 0, 3:] == -1e4).all()
        assert not found.weight[0, 0, 3:].any()
        assert (found.bias[0, 1, :4] > -100).all()
        assert (softmax(found.head(0, 0).logits(x[0]), axis=1)[:, 3:] == 0).all()
        assert found.bias[1, 0, 0] == -1e4


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("width", [WIDTH, 60])
def test_ridge_is_scikit_learns(width: int, intercept: bool) -> None:
    x, y, weight = random_problems(width=width)
    for c, found in zip(STRENGTHS, fit_ridge(Problems(x, y, weight, CLASSES, intercept), STRENGTHS), strict=True):
        assert found.converged.all()
        for s, p in np.ndindex(SETS, 3):
            used = weight[s, p] > 0
            model = Ridge(alpha=1 / c, fit_intercept=intercept, solver="cholesky")
            model.fit(x[s][used], np.eye(CLASSES)[y[s, p][used]], sample_weight=weight[s, p][used])
            assert np.abs(found.weight[s, p] - model.coef_).max() < 1e-8
            assert np.abs(found.bias[s, p] - model.intercept_).max() < 1e-8


def test_gradient_is_that_of_the_objective() -> None:
    """Central differences of a slow objective; an absent class and two classes are among the problems."""
    x, y, weight = random_problems(width=3)
    weight[0, 0, y[0, 0] == 3] = 0
    y[1, 0] %= 2
    of, c = logistic._Objective(Problems(x, y, weight, CLASSES, True), 0.7), 0.7
    parameters = of.problems.x.new_tensor(np.random.default_rng(1).normal(size=(SETS, 4, 3, CLASSES)))

    def objective(s: int, p: int, of_problem: np.ndarray) -> float:
        total, there = 0.0, sorted(set(y[s, p][weight[s, p] > 0].tolist()))
        for image, label, w in zip(x[s], y[s, p], weight[s, p], strict=True):
            logits = np.array([image @ of_problem[:3, k] + of_problem[3, k] for k in there])
            if w > 0:
                total += w * (np.log(np.exp(logits).sum()) - logits[there.index(label)])
        return c * total + (2 if len(there) == 2 else 1) * (of_problem[:3] ** 2).sum() / 2

    found = of.gradient(parameters).numpy()
    for s, p in ((0, 0), (1, 0), (1, 2)):
        at = parameters[s, :, p].numpy()
        for place in ((0, 0), (2, 1), (3, 1)):
            step = np.zeros_like(at)
            step[place] = 1e-5
            slope = (objective(s, p, at + step) - objective(s, p, at - step)) / 2e-5
            assert found[s, :, p][place] == pytest.approx(slope, abs=1e-6)


def test_norm_counts_the_intercept_in_units_of_a_strength_below_1() -> None:
    x, y, weight = random_problems(width=3)
    gradient = torch.from_numpy(np.random.default_rng(1).normal(size=(SETS, 4, 3, CLASSES)))
    for c, unit in ((0.25, 0.25), (1.5, 1)):
        found = logistic._Objective(Problems(x, y, weight, CLASSES, True), c).norm(gradient)
        expected = ((gradient[:, :3] ** 2).sum(dim=(1, 3)) + (gradient[:, 3] / unit).pow(2).sum(dim=2)).sqrt()
        assert torch.allclose(found[:, 0, :, 0], expected, rtol=1e-12)


def test_inverse_hessian_is_that_of_the_mean_over_classes_and_problems() -> None:
    """The blocks of a class with itself; the slow sum is over images, problems and classes."""
    x, y, weight = random_problems(width=3)
    y[1, 0] %= 2  # two classes: the penalty counts twice
    of, c = logistic._Objective(Problems(x, y, weight, CLASSES, True), 0.7), 0.7
    parameters = np.random.default_rng(1).normal(size=(SETS, 4, 3, CLASSES))
    found = of.inverse_hessian(torch.from_numpy(parameters)).numpy()
    for s in range(SETS):
        hessian = np.zeros((4, 4))
        for p in range(3):
            there = sorted(set(y[s, p][weight[s, p] > 0].tolist()))
            hessian += np.diag([2.0 if len(there) == 2 else 1.0] * 3 + [0]) / 3
            for image, w in zip(np.c_[x[s], np.ones(IMAGES)], weight[s, p], strict=True):
                chances = softmax(image @ parameters[s, :, p][:, there])
                curvature = w * sum(chance * (1 - chance) for chance in chances) / CLASSES
                hessian += c * curvature * np.outer(image, image) / 3
        hessian[3, 3] += 1e-3 * c
        assert np.allclose(found[s] @ hessian, np.eye(4), rtol=0, atol=1e-9)


class Tried:
    """Replaces gradient and Hessian, and notes the points at which the gradient is asked for, and when a Hessian is.

    The objectives are of one weight each: quadratic ones with the optimum 1, and one that falls for ever.
    """

    def __init__(self, curvatures: list[float], patch: pytest.MonkeyPatch) -> None:
        self.curvatures, self.asked, self.points = torch.tensor(curvatures).double(), list[str](), list[list[float]]()
        patch.setattr(logistic._Objective, "gradient", lambda _, at: self.gradient(at))
        patch.setattr(logistic._Objective, "inverse_hessian", lambda *_: self.hessian())

    def gradient(self, at: torch.Tensor) -> torch.Tensor:
        self.asked.append("g")
        self.points.append(at.flatten().tolist())
        slopes = self.curvatures * (at.flatten() - 1)
        return torch.where(self.curvatures > 0, slopes, -1.0).view(at.shape)

    def hessian(self) -> torch.Tensor:
        self.asked.append("h")
        return torch.ones(1, 1, 1).double()

    def found(self) -> Regressions:
        count = len(self.curvatures)
        problems = Problems(
            np.ones((1, 1, 1)), np.zeros((1, count, 1), dtype=int), np.ones((1, count, 1)), 1, intercept=False
        )
        return next(fit_logistic(problems, [1]))


def test_step_that_is_too_long_is_tried_again_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is taken where the slope after it is at most `ENOUGH` of the one before; else the secant says how long.

    A step is shortened to a tenth at most, and to `ENOUGH` at least. The slope of the last one never rises.
    """
    monkeypatch.setattr(logistic, "ENOUGH", 0.5)
    monkeypatch.setattr(logistic, "MAX_ITER", 3)
    tried = Tried([1.5, 4, 100, 0], monkeypatch)
    found = tried.found()
    start, *points = tried.points
    assert start == [0] * 4
    assert points[0] == [1.5, 4, 100, 1]  # the first ends just there: it is taken
    assert points[1] == pytest.approx([1, 1, 10, 0.5])
    assert points[2][2:] == pytest.approx([1, 0.25])
    assert found.converged.tolist() == [[True, True, True, False]]
    assert found.weight.flatten().tolist() == pytest.approx([1, 1, 1, 0])


@pytest.mark.parametrize("most", [1, 3, 12, 20])
def test_hessian_is_computed_anew_every_ten_of_the_steps_that_are_allowed(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic, "MAX_ITER", most)
    tried = Tried([0], monkeypatch)
    assert not tried.found().converged
    assert "".join(tried.asked) == "gh" + {1: "g", 3: "ggg", 12: 10 * "g" + "hgg", 20: 2 * (10 * "g" + "h")}[most]


def test_ten_steps_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: list[int] = []
    descent = logistic._descent
    monkeypatch.setattr(
        logistic, "_descent", lambda g, past, *of: remembered.append(len(past)) or descent(g, past, *of)
    )  # type: ignore[func-returns-value]
    list(fit_logistic(Problems(*random_problems(), CLASSES, True), [4000]))
    assert remembered[:11] == [*range(1, 11), 10]
    assert set(remembered[10:]) == {10}


def test_gradient_of_huge_features_need_not_fall_below_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient at zero weights is 1e9 and more: it is known to 1e-7, not to 1e-5."""
    monkeypatch.setattr(logistic, "MAX_ITER", 300)
    x, y, weight = random_problems()
    (found,) = fit_logistic(Problems(x * 1e9, y, weight, CLASSES, True), [1])
    assert found.converged.all()


def test_more_features_than_images_are_projected_and_no_fewer() -> None:
    x, y, weight = random_problems(width=41)
    for width, inner in ((39, 39), (40, 40), (41, 40)):
        problems = Problems(x[:, :, :width], y, weight, CLASSES, True)
        assert problems.x.shape == (SETS, IMAGES, inner + 1)
        assert torch.equal(problems.x[:, :, :width], torch.from_numpy(x[:, :, :width])) == (width < 41)


def test_everything_lies_on_the_device_that_is_given() -> None:
    problems = Problems(*random_problems(), CLASSES, True, torch.device("meta"))
    tensors = [problems.x, problems.weight, problems.present, problems.penalised, problems._labels]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_block_has_one_row_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "BLOCK", 1)
    blocks = list(Problems(*random_problems(), CLASSES, True).blocks())
    assert blocks == [slice(row, row + 1) for row in range(IMAGES)]


def test_classifiers_do_not_depend_on_the_size_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted() -> Sequence[Regressions]:
        x, y, weight = random_problems()
        return [next(fit(Problems(x, y, weight, CLASSES, True), [1])) for fit in (fit_logistic, fit_ridge)]

    whole, again = fitted(), fitted()
    monkeypatch.setattr(regression, "BLOCK", 7 * SETS * 3 * CLASSES)
    for one, other, in_blocks in zip(whole, again, fitted(), strict=True):
        assert one.weight.tobytes() == other.weight.tobytes()
        assert np.abs(one.weight - in_blocks.weight).max() < 1e-5


def test_problem_of_a_strong_penalty_is_not_disturbed_by_a_hard_one() -> None:
    """Separable images beside noise; each problem equals the same problem alone."""
    x, y, weight = random_problems()
    x[0] += 50 * np.eye(CLASSES, WIDTH)[y[0, 0]]
    (together,) = fit_logistic(Problems(x, y, weight, CLASSES, True), [10])
    for s, p in np.ndindex(SETS, 3):
        (alone,) = fit_logistic(
            Problems(x[s : s + 1], y[s : s + 1, p : p + 1], weight[s : s + 1, p : p + 1], CLASSES, True), [10]
        )
        assert np.abs(together.weight[s, p] - alone.weight[0, 0]).max() < CLOSE


@pytest.mark.parametrize("change", ["equal columns", "a column of zeros", "a large scale", "one image a class"])
def test_hard_features_converge(change: str) -> None:
    x, y, weight = random_problems()
    match change:
        case "equal columns":
            x[:, :, 1] = x[:, :, 0]
        case "a column of zeros":
            x[:, :, 1] = 0
        case "a large scale":
            x *= 10
        case "one image a class":
            weight[:, :, 4:] = 0
            y[:, :, :4], weight[:, :, :4] = np.arange(4), 1
    for found in fit_logistic(Problems(x, y, weight, CLASSES, True), [0.1, 100]):
        assert found.converged.all()
        assert np.isfinite(found.weight).all()


def test_problem_that_needs_more_steps_than_allowed_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a set may, beside another that has."""
    x, y, weight = random_problems()
    weight[:, 0] *= 1e-6  # next to no image: the optimum is near 0
    steps = []
    for most in range(1, 60):
        monkeypatch.setattr(logistic, "MAX_ITER", most)
        (found,) = fit_logistic(Problems(x, y, weight, CLASSES, True), [1])
        if found.converged.all():
            break
        steps.append(found.converged.any(axis=0).tolist())
    assert 5 < len(steps) < 59
    assert steps[0] == [False] * 3
    assert [True, False, False] in steps


def test_few_steps_serve_digits_with_a_weak_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """130 labels, 64 pixels, C = 10: without the true Hessian's scale it is three times as many."""
    x, y = load_digits(return_X_y=True)
    x = ((x - x.mean(0)) / np.maximum(x.std(0), 1e-6))[:130]
    monkeypatch.setattr(logistic, "MAX_ITER", 130)
    (found,) = fit_logistic(Problems(x[None], y[None, None, :130], np.ones((1, 1, 130)), 10, True), [10])
    assert found.converged.all()
