"""Nearest neighbours by cosine similarity, and weighted k-NN classification (Wu et al. 2018, section 3.4)."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

K, TEMPERATURE = 20, 0.07  # usual values (Wu et al. 2018; Caron et al. 2021)
QUERIES, CANDIDATES = 256, 65_536  # per block: 64 MiB of similarities


@torch.inference_mode()
def knn_predict(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    classes: int,
    k: int,
    temperature: float,
    device: torch.device | None = None,
) -> np.ndarray:
    """Let the k most similar training images vote. Each vote has the weight exp(cosine / temperature).

    Args:
        train: (N, D) features.
        labels: (N,) class indices.
        queries: (M, D) features.
        classes: number of classes.
        k: number of neighbours, at most N.
        temperature: T; 0.07 is usual.
        device: where to compute; the CPU unless given.

    Returns:
        (M,) class indices.
    """
    of_train = torch.from_numpy(labels).to(device)
    predictions = []
    for best, nearest in nearest_neighbours(train, queries, k, device):
        # relative to the best similarity: this cannot overflow at a small temperature
        weights = ((best - best[:, :1]) / temperature).exp()
        votes = torch.zeros(len(best), classes, dtype=best.dtype, device=device)
        predictions.append(votes.scatter_add_(1, of_train[nearest], weights).argmax(dim=1).cpu())
    return torch.cat(predictions).numpy()


@torch.inference_mode()
def nearest_neighbours(
    train: np.ndarray, queries: np.ndarray, k: int, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Find the k most similar training images of each query, for a block of queries at a time.

    The result is exact. Similarities are computed block by block, and the k best so far are kept. The whole matrix is
    never in memory. Memory-mapped features are never in memory all at once.

    Args:
        train: (N, D) features.
        queries: (M, D) features.
        k: number of neighbours, at most N.
        device: where to compute; the CPU unless given.

    Yields:
        Cosines (B, k), the highest first, and the rows of those images in `train`, (B, k). Together the blocks are all
        queries in order.
    """
    k = min(k, len(train))
    for start in range(0, len(queries), QUERIES):
        query = _unit(queries[start : start + QUERIES], device)
        best = torch.full((len(query), k), -torch.inf, dtype=query.dtype, device=device)
        nearest = torch.zeros(len(query), k, dtype=torch.int64, device=device)
        for first in range(0, len(train), CANDIDATES):
            similarity = query @ _unit(train[first : first + CANDIDATES], device).T
            of_block, rows = similarity.topk(min(k, similarity.shape[1]))
            best, chosen = torch.cat([best, of_block], dim=1).topk(k)
            nearest = torch.cat([nearest, rows + first], dim=1).gather(1, chosen)
        yield best, nearest


def _unit(features: np.ndarray, device: torch.device | None) -> Tensor:
    rows = torch.from_numpy(np.ascontiguousarray(features)).to(device)
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1)
