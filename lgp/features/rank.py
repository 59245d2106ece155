"""The effective rank of features: in how many directions they spread."""

import numpy as np


def effective_rank(features: np.ndarray) -> float:
    """Return exp of the entropy of the normalised singular values of the centred features (N, D).

    It is between 1 and min(N, D) (Roy and Vetterli 2007), and 0 for features that are not finite. RankMe (Garrido et
    al. 2023) follows a training by it.
    """
    if not np.isfinite(features).all():
        return 0.0
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    share = singular / max(float(singular.sum()), 1e-12)
    return float(np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum()))
