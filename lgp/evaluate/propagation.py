"""Label propagation: the labels of few training images spread to all of them over their k-NN graph.

Scores spread as in Zhou et al. 2004 ("Learning with local and global consistency"). Affinity and confidence are those
of Iscen et al. 2019 ("Label propagation for deep semi-supervised learning"). A classifier is then fitted to all
training images. Test and validation images are never in the graph.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import entr

from lgp.errors import LgpError
from lgp.evaluate.logistic import fit_logistic
from lgp.evaluate.regression import Problems
from lgp.features.knn import nearest_neighbours
from lgp.models.classifier_folder import Head
from lgp.params.evaluate import PropagationParams

UNKNOWN = -1  # the label of an image that has none
EXACT = 1e-9  # the largest error of a score; the score of an image with its own label is at least 1


@dataclass(frozen=True)
class Neighbours:
    """The nearest neighbours of each image of the training part.

    Attributes:
        cosines: (N, k), the highest first.
        rows: (N, k), the numbers of those images. No image is its own neighbour.
    """

    cosines: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Propagated:
    """A label for each training image.

    Attributes:
        labels: (N,) class indices; -1 for an image that no label reaches.
        confidence: (N,) in [0, 1]. It is 1 for an image with its own label, and 0 where no label arrives.
    """

    labels: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class ChosenPropagation:
    """The propagation that validation chose.

    Attributes:
        k: number of neighbours.
        alpha: share that an image takes from its neighbours.
        val: accuracy of the classifier on val, in [0, 1].
        propagated: the labels.
        head: the classifier that is fitted to them, with a logit for each class.
        converged: whether its regression did.
    """

    k: int
    alpha: float
    val: float
    propagated: Propagated
    head: Head
    converged: bool


def find_neighbours(x: np.ndarray, k: int, device: torch.device | None = None) -> Neighbours:
    """Find the k nearest other images of each image by cosine.

    The search takes the most time of a propagation. Its result serves all subsets of labels and all smaller k.

    Args:
        x: (N, D) features of the training part.
        k: number of neighbours. With fewer other images all of them are neighbours.
        device: where to search; the CPU unless given.
    """
    blocks = [(cosines.cpu().numpy(), rows.cpu().numpy()) for cosines, rows in nearest_neighbours(x, x, k + 1, device)]
    cosines, rows = (np.concatenate(of_all) for of_all in zip(*blocks, strict=True))
    own = rows == np.arange(len(rows))[:, None]
    own[~own.any(axis=1), -1] = True  # k + 1 others are as near as the image itself: the last is one too many
    return Neighbours(*(found[~own].reshape(len(rows), -1) for found in (cosines, rows)))


def affinity(neighbours: Neighbours, k: int, gamma: float) -> sparse.csr_array:
    """Return the symmetric affinity A + Aᵀ of all images, (N, N), with A = max(cosine, 0)^γ for the k nearest.

    Two images that are each other's neighbours count twice (Iscen et al. 2019, section 4.1).
    """
    weights = neighbours.cosines[:, :k].astype(np.float64).clip(min=0) ** gamma
    images, found = weights.shape
    assert found == min(k, images - 1), "too few neighbours were searched for"
    starts = np.arange(images + 1) * found
    directed = sparse.csr_array((weights.ravel(), neighbours.rows[:, :k].ravel(), starts), shape=(images, images))
    return directed + directed.T


def spread(weights: sparse.csr_array, known: np.ndarray, alpha: float) -> np.ndarray:
    """Return the scores F = (I - αS)⁻¹ Y, (N, C), with S = D^-½ W D^-½ (Zhou et al. 2004, without the factor 1 - α).

    Conjugate gradients solve the system, for all classes at once. No score is off by more than `EXACT`, and one below
    that is 0.

    Args:
        weights: W (N, N), symmetric and not negative.
        known: Y (N, C), 1 where an image has that label, else 0.
        alpha: in (0, 1).
    """
    degree = weights.sum(axis=0)
    root = sparse.diags_array(1 / np.sqrt(np.where(degree > 0, degree, 1.0)))
    normalised = (root @ weights @ root).tocsr()

    def system(scores: np.ndarray) -> np.ndarray:
        by_class = scores.reshape(known.shape)
        return (by_class - alpha * (normalised @ by_class)).ravel()

    operator = LinearOperator((known.size, known.size), matvec=system, dtype=np.float64)
    # the smallest eigenvalue of I - αS is 1 - α, so the error is at most the residual / (1 - α)
    scores, unsolved = cg(operator, known.ravel().astype(np.float64), rtol=0.0, atol=EXACT * (1 - alpha))
    assert not unsolved
    return np.where(scores > EXACT, scores, 0.0).reshape(known.shape)


def propagated(
    weights: sparse.csr_array, y_known: np.ndarray, classes: int, alpha: float, balance: Literal["equal", "none"]
) -> Propagated:
    """Give each training image the class with its highest score.

    The scores p of an image are scaled to a sum of 1. Its confidence is 1 - H(p) / log(classes), where H is the entropy
    (Iscen et al. 2019, equation 11).

    Args:
        weights: (N, N), from `affinity`.
        y_known: (N,) class indices; -1 where the label is not known. An image with a label keeps it.
        classes: number of classes. Some may have no labelled image; no image then gets them.
        alpha: share that an image takes from its neighbours.
        balance: `equal` first scales the scores of each class to the same sum over all images (class mass
            normalisation of Zhu et al. 2003 with equal priors); `none` does not.

    Raises:
        LgpError: fewer than two classes have a label.
    """
    labelled = np.flatnonzero(y_known != UNKNOWN)
    if (found := len(np.unique(y_known[labelled]))) < 2:
        raise LgpError(f"propagation got labels of {found} classes, and needs two or more: label images of others")
    known = np.zeros((len(y_known), classes))
    known[labelled, y_known[labelled]] = 1
    scores = spread(weights, known, alpha)
    if balance == "equal":
        scores = _shares(scores, axis=0)
    shares = _shares(scores, axis=1)
    reached = shares.any(axis=1)
    labels = np.where(reached, shares.argmax(axis=1), UNKNOWN)
    confidence = np.where(reached, 1 - entr(shares).sum(axis=1) / np.log(classes), 0.0).clip(0, 1)
    labels[labelled], confidence[labelled] = y_known[labelled], 1.0
    return Propagated(labels, confidence)


def _shares(scores: np.ndarray, axis: int) -> np.ndarray:
    """Scale the scores to a sum of 1 along an axis. Where all are 0 they stay 0."""
    total = scores.sum(axis=axis, keepdims=True)
    return scores / np.where(total > 0, total, 1.0)


def fit_to_propagated(
    x: np.ndarray, labels: Sequence[Propagated], classes: int, c: float, device: torch.device | None = None
) -> list[tuple[Head, bool]]:
    """Fit logistic regression to all training images that a label reaches. Their weights are the confidences.

    Args:
        x: (N, D) features of the training part.
        labels: several labellings of those images.
        classes: number of classes.
        c: scikit-learn's inverse strength. The loss is a sum over images, so more images need no larger C.
        device: where to compute; the CPU unless given.

    Returns:
        For each labelling a classifier, and whether its regression converged.
    """
    y, weight = np.stack([of.labels for of in labels]), np.stack([of.confidence for of in labels])
    problems = Problems(x[None], y[None], weight[None], classes, intercept=True, device=device)
    (found,) = fit_logistic(problems, [c])
    return [(found.head(0, number), bool(found.converged[0, number])) for number in range(len(labels))]


def choose_propagation(
    neighbours: Neighbours,
    x: np.ndarray,
    y_known: np.ndarray,
    x_val: np.ndarray,
    y_val: np.ndarray,
    classes: int,
    params: PropagationParams,
    device: torch.device | None = None,
) -> ChosenPropagation:
    """Propagate with each k and alpha of the parameters. Return the one whose classifier is the best on val.

    A tie goes to the first: the k and the alpha that stand first in the parameters.

    Args:
        neighbours: of `x`, at least as many as the largest k.
        x: (N, D) features of the training part.
        y_known: (N,) class indices; -1 where the label is not known.
        x_val: (M, D) features of val.
        y_val: (M,) class indices.
        classes: number of classes.
        params: what to try.
        device: where the classifiers are fitted; the CPU unless given.

    Raises:
        LgpError: val is empty, or fewer than two classes have a label.
    """
    if not len(y_val):
        raise LgpError("val has no image, so it cannot choose the propagation: raise data.val_share")

    tried = list(itertools.product(params.k, params.alpha))
    labels = [
        propagated(affinity(neighbours, k, params.gamma), y_known, classes, alpha, params.balance) for k, alpha in tried
    ]
    fitted = fit_to_propagated(x, labels, classes, params.c, device)
    on_val = [float((head.logits(x_val).argmax(axis=1) == y_val).mean()) for head, _ in fitted]
    best = int(np.argmax(on_val))
    return ChosenPropagation(*tried[best], on_val[best], labels[best], *fitted[best])
