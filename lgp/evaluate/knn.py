"""Weighted k-nearest-neighbour classification on cosine similarity (Wu et al. 2018, section 3.4)."""

import numpy as np

BLOCK = 1024


def knn_predict(
    train: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
    """Let the k most similar training images vote, each with weight exp(cosine / temperature).

    The similarities are computed in blocks of queries, so the whole matrix is never held.

    Args:
        train: (N, D) features.
        labels: (N,) class indices.
        queries: (M, D) features.
        classes: number of classes.
        k: neighbours; all N where N is smaller.
        temperature: T; 0.07 is usual.

    Returns:
        (M,) class indices.
    """
    train, queries = _unit(train), _unit(queries)
    k = min(k, len(train))
    predictions = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), BLOCK):
        similarity = queries[start : start + BLOCK] @ train.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(similarity, nearest, axis=1) / temperature)
        votes = np.zeros((len(similarity), classes))
        np.add.at(votes, (np.arange(len(similarity))[:, None], labels[nearest]), weights)
        predictions[start : start + BLOCK] = votes.argmax(axis=1)
    return predictions


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
