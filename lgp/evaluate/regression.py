"""Linear classifiers that are fitted together: several sets of images, and several labellings of each.

S sets have N images each. Each set has P problems: their labels and weights differ, their images are the same. A fold
that leaves images out gives these the weight 0. All is computed in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lgp.models.classifier_folder import Head

NEVER = -1e4  # the logit of a class without a labelled image: its probability is 0 in single precision
BLOCK = 2**22  # logits that are in memory at once


@dataclass(frozen=True)
class Regressions:
    """Fitted classifiers.

    Attributes:
        weight: (S, P, K, D).
        bias: (S, P, K); `NEVER` for a class that the problem has no image of.
        converged: (S, P) bool.
    """

    weight: np.ndarray
    bias: np.ndarray
    converged: np.ndarray

    def head(self, of_set: int, problem: int) -> Head:
        """Return one of the classifiers."""
        return Head(self.weight[of_set, problem], self.bias[of_set, problem])


class Problems:
    """Images, labels and weights as tensors of one device.

    With more features than images the images are projected on an orthonormal basis of their span. The weights of an
    L2-penalised linear model lie in that span, with and without an intercept. The model is therefore the same, and is
    found faster.

    Args:
        x: (S, N, D) features.
        y: (S, P, N) class indices; any where the weight is 0.
        weight: (S, P, N), 0 or more. Every problem has a class with a positive weight.
        classes: K.
        intercept: whether the classifiers have one. It is not penalised.
        device: where to compute; the CPU unless given.

    Attributes:
        x: (S, N, D'); the last column is 1 if there is an intercept.
        weight: (S, N, P).
        present: (S, P, K) bool, the classes that have an image.
        penalised: (D',), 1 for a weight and 0 for the intercept.
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        weight: np.ndarray,
        classes: int,
        intercept: bool,
        device: torch.device | None = None,
    ) -> None:
        features = torch.from_numpy(x.astype(np.float64)).to(device)
        self._basis: Tensor | None = None
        if features.shape[2] > features.shape[1]:
            self._basis = torch.linalg.qr(features.mT).Q
            features = features @ self._basis
        self.penalised = features.new_ones(features.shape[2] + intercept)
        if intercept:
            features = torch.cat([features, features.new_ones(*features.shape[:2], 1)], dim=2)
            self.penalised[-1] = 0
        self.x, self._intercept = features, intercept
        of_weight = torch.from_numpy(weight.astype(np.float64)).to(device)
        self.weight = of_weight.mT.contiguous()
        labels = torch.from_numpy(np.where(weight > 0, y, 0)).to(device)
        self._labels = labels.mT[..., None].contiguous()
        # CUDA reduces no booleans
        self.present = of_weight.new_zeros(*labels.shape[:2], classes).scatter_add(2, labels, of_weight) > 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of all parameters, (S, D', P, K): so one matrix product of a set serves its problems."""
        sets, problems, classes = self.present.shape
        return sets, self.x.shape[2], problems, classes

    def blocks(self) -> Iterator[slice]:
        """Yield rows of all sets, so few that their logits fit into memory."""
        sets, _, problems, classes = self.shape
        rows = max(BLOCK // (sets * problems * classes), 1)
        yield from (slice(start, start + rows) for start in range(0, self.x.shape[1], rows))

    def logits(self, rows: slice, parameters: Tensor) -> Tensor:
        """Return the logits (S, rows, P, K) of parameters (S, D', P, K)."""
        return torch.bmm(self.x[:, rows], parameters.flatten(2)).unflatten(2, parameters.shape[2:])

    def less_labels(self, rows: slice, scores: Tensor) -> Tensor:
        """Return scores (S, rows, P, K) less 1 at the label of each image, times its weight. It changes `scores`."""
        labels = self._labels[:, rows]
        scores.scatter_add_(3, labels, scores.new_full((), -1.0).expand(labels.shape))
        return scores.mul_(self.weight[:, rows, :, None])

    def back(self, rows: slice, scores: Tensor) -> Tensor:
        """Return the products of features and scores (S, rows, P, K), summed over images, (S, D', P, K)."""
        return torch.bmm(self.x[:, rows].mT, scores.flatten(2)).unflatten(2, scores.shape[2:])

    def regressions(self, parameters: Tensor, converged: Tensor) -> Regressions:
        """Return the classifiers of parameters (S, D', P, K)."""
        weight = parameters[:, :-1] if self._intercept else parameters
        bias = parameters[:, -1] if self._intercept else torch.zeros_like(parameters[:, 0])
        if self._basis is not None:
            weight = torch.bmm(self._basis, weight.flatten(2)).unflatten(2, weight.shape[2:])
        return Regressions(
            weight.permute(0, 2, 3, 1).cpu().numpy(),
            bias.masked_fill(~self.present, NEVER).cpu().numpy(),
            converged.cpu().numpy(),
        )
