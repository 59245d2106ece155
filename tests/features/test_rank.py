"""The effective rank of features."""

import numpy as np
import pytest

from lgp.features.rank import effective_rank


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_features_that_spread_alike_in_some_directions_have_their_number(rank: int) -> None:
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:rank]
    features = np.concatenate([directions, -directions]) + 5  # a mean is no direction
    assert effective_rank(features) == pytest.approx(rank, abs=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_have_none(value: float) -> None:
    features = np.random.default_rng(0).normal(size=(8, 4))
    features[2, 1] = value
    assert effective_rank(features) == 0.0
