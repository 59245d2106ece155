"""Ridge regression in closed form: least squares on one-hot labels with an L2 penalty.

A problem minimises |w|²/2 + C Σ weight · |label - prediction|²/2 over its images: scikit-learn's Ridge with α = 1 / C.
The predictions are no logits yet: a temperature makes probabilities of them.
"""

from collections.abc import Iterable, Iterator

import torch

from lgp.evaluate.regression import Problems, Regressions


def fit_ridge(problems: Problems, strengths: Iterable[float]) -> Iterator[Regressions]:
    """Fit ridge regression to each problem, with one strength after another.

    The products of features are computed once, in the order of the rows. Every problem converges.

    Args:
        problems: images, labels and weights.
        strengths: C, the inverse of scikit-learn's α.
    """
    sets, width, count, _ = problems.shape
    gram = problems.x.new_zeros(sets, count, width, width)
    targets = problems.x.new_zeros(problems.shape)
    for rows in problems.blocks():
        x, weight = problems.x[:, rows], problems.weight[:, rows]
        for number in range(count):
            gram[:, number] += torch.bmm(x.mT, x * weight[:, :, number, None])
        none = x.new_zeros(sets, x.shape[1], *problems.shape[2:])
        targets -= problems.back(rows, problems.less_labels(rows, none))
    penalty = torch.diag_embed(problems.penalised)
    right = targets.transpose(1, 2)  # (S, P, D', K)
    for c in strengths:
        found = torch.cholesky_solve(c * right, torch.linalg.cholesky(c * gram + penalty))
        yield problems.regressions(found.transpose(1, 2), torch.ones_like(problems.present[..., 0]))
