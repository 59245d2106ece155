"""Logistic regression by L-BFGS (Nocedal and Wright 2006, algorithm 7.5), many problems at once, on any device.

A problem minimises |w|²/2 + C Σ weight · loss over its images, as scikit-learn's LogisticRegression. The loss is
the cross-entropy of the softmax over the classes that have an image. Two classes have one weight vector in
scikit-learn, and here two opposite ones whose penalty counts twice: the probabilities are the same.

The initial Hessian of L-BFGS is the true one, but with the mean p(1 - p) of all classes and problems of a set in place
of each. It is computed again every `EVERY` steps. That takes a third of the steps, or fewer with large C.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lgp.evaluate.regression import Problems, Regressions

# of the objective's gradient. Its curvature in the weights is 1 or more, so they are no further from the optimum
TOL = 1e-5
ROUNDING = 1e-12  # of the gradient at zero weights: no smaller gradient can be told from 0
MAX_ITER = 5000
MEMORY = 10  # steps that L-BFGS remembers
EVERY = 10  # steps between two initial Hessians
ENOUGH = 0.9  # the slope after a step may be that far above 0, relative to the slope before it


def fit_logistic(problems: Problems, strengths: Iterable[float]) -> Iterator[Regressions]:
    """Fit logistic regression to each problem, with one strength after another.

    A weak penalty takes ten times the steps of a strong one. So all problems of a strength are solved together, and
    no two strengths are. Each problem takes its own steps. It has converged if the norm of its gradient is at most
    `TOL` within `MAX_ITER` steps. No problem depends on another, but for the initial Hessian of its set.

    Args:
        problems: images, labels and weights.
        strengths: C, scikit-learn's inverse strength.
    """
    return (_Objective(problems, c).minimised() for c in strengths)


class _Objective:
    """The objectives of all problems. Parameters, gradients and directions are (S, D', P, K)."""

    def __init__(self, problems: Problems, c: float) -> None:
        self.problems, self.c = problems, c
        self.impossible = torch.zeros_like(problems.present, dtype=torch.float64)
        self.impossible.masked_fill_(~problems.present, -torch.inf).unsqueeze_(1)
        twice = torch.where(problems.present.sum(2) == 2, 2.0, 1.0)  # (S, P)
        self.penalty = problems.penalised[:, None] * twice[:, None, :]  # (S, D', P)
        # the curvature in the intercept has no penalty, and falls with C
        self.unit = torch.where(problems.penalised > 0, 1.0, min(c, 1.0))[:, None, None]

    def minimised(self) -> Regressions:
        parameters = self.problems.x.new_zeros(self.problems.shape)
        gradient = self.gradient(parameters)
        inverse = self.inverse_hessian(parameters)
        tolerance = (ROUNDING * self.norm(gradient)).clamp(min=TOL)
        direction, length = -_times(inverse, gradient), torch.ones_like(tolerance)
        past: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=MEMORY)
        scale = torch.ones_like(tolerance)
        for number in range(1, MAX_ITER + 1):
            active = self.norm(gradient) > tolerance
            if not active.any():
                break
            step = length * direction
            change = self.gradient(parameters + step) - gradient
            before, rise = _dot(gradient, direction), _dot(change, direction)
            # the objective is convex: a step that is too long ends on a steep rise, and is tried again, shorter
            taken = active & (before + rise <= -ENOUGH * before) & (rise > 0)
            step, change = (torch.where(taken, of, 0.0) for of in (step, change))
            parameters, gradient = parameters + step, gradient + change
            if number % EVERY == 0:
                inverse = self.inverse_hessian(parameters)
            product = _dot(step, change)
            past.append((step, change, torch.where(taken, 1 / product, 0.0)))
            scale = torch.where(taken, product / _dot(change, _times(inverse, change)), scale)
            direction = torch.where(taken, _descent(gradient, past, inverse, scale), direction)
            length = torch.where(taken, 1.0, length * (-before / rise).clamp(0.1, ENOUGH))
        return self.problems.regressions(parameters, (self.norm(gradient) <= tolerance)[:, 0, :, 0])

    def norm(self, gradient: Tensor) -> Tensor:
        """Return the norm of each problem's gradient, (S, 1, P, 1), that of the intercept in units of C below 1."""
        scaled = gradient / self.unit
        return _dot(scaled, scaled).sqrt()

    def gradient(self, parameters: Tensor) -> Tensor:
        total = torch.zeros_like(parameters)
        for rows in self.problems.blocks():
            total += self.problems.back(rows, self.problems.less_labels(rows, self.probabilities(rows, parameters)))
        return total.mul_(self.c).addcmul_(self.penalty[..., None], parameters)

    def probabilities(self, rows: slice, parameters: Tensor) -> Tensor:
        return torch.softmax(self.problems.logits(rows, parameters).add_(self.impossible), dim=3)

    def inverse_hessian(self, parameters: Tensor) -> Tensor:
        """Return the inverse of the mean Hessian of classes and problems, (S, D', D')."""
        hessian = torch.diag_embed(self.penalty.mean(dim=2))
        classes = parameters.shape[3]
        for rows in self.problems.blocks():
            spread = (1 - self.probabilities(rows, parameters).square().sum(dim=3)) / classes  # the mean p(1 - p)
            x, curvature = self.problems.x[:, rows], (self.problems.weight[:, rows] * spread).mean(dim=2)
            hessian += self.c * torch.bmm(x.mT, x * curvature[..., None])
        # the intercept has no penalty: where every probability is 0 or 1 its curvature is 0
        hessian.diagonal(dim1=1, dim2=2)[:, self.problems.penalised == 0] += 1e-3 * self.c
        return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


def _descent(gradient: Tensor, past: deque[tuple[Tensor, Tensor, Tensor]], inverse: Tensor, scale: Tensor) -> Tensor:
    """Return minus the product of the inverse Hessian of L-BFGS and the gradient (two loops over the past steps)."""
    direction, shares = -gradient, []
    for step, change, inverse_product in reversed(past):
        share = inverse_product * _dot(step, direction)
        direction = torch.addcmul(direction, share, change, value=-1)
        shares.append(share)
    direction = scale * _times(inverse, direction)
    for (step, change, inverse_product), share in zip(past, reversed(shares), strict=True):
        direction = torch.addcmul(direction, share - inverse_product * _dot(change, direction), step)
    return direction


def _times(matrix: Tensor, of_all: Tensor) -> Tensor:
    return torch.bmm(matrix, of_all.flatten(2)).unflatten(2, of_all.shape[2:])


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of each problem, (S, 1, P, 1)."""
    return (one * other).sum(dim=(1, 3), keepdim=True)
