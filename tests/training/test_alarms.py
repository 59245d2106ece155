"""Warnings while a training runs: once for each fall of a measure."""

from pathlib import Path

import pytest
from test_loop import tiny

from lgp.data.labels import LabelledImages
from lgp.training.alarms import KNN, RANK, fallen


def told(values: list[float | None], name: str) -> list[int]:
    """Return the epochs, from 0, after which a line is said."""
    history = [{"epoch": float(i)} | ({} if value is None else {name: value}) for i, value in enumerate(values)]
    return [end for end in range(len(history)) if fallen(history[: end + 1])]


@pytest.mark.parametrize(
    ("values", "epochs"),
    [
        ([], []),
        ([50.0], []),
        ([50.0, 60.0, 70.0], []),
        ([50.0, 40.0], []),  # ten points are noise
        ([50.0, 39.9], [1]),
        ([50.0, None, 39.0, 38.0, None, 39.0], [2]),  # once
        ([50.0, 39.0, 45.0, 39.0], [1, 3]),  # again after it rose
        ([50.0, 45.0, 42.0, 39.0], [3]),  # from the best, not from the last
    ],
)
def test_accuracy_that_falls_ten_points_below_its_best_is_told_once(
    values: list[float | None], epochs: list[int]
) -> None:
    assert told(values, KNN) == epochs


@pytest.mark.parametrize(("values", "epochs"), [([20.0, 10.0], []), ([20.0, 9.9, 8.0], [1]), ([4.0, 20.0, 9.0], [2])])
def test_rank_that_falls_below_half_its_best_is_told_once(values: list[float | None], epochs: list[int]) -> None:
    assert told(values, RANK) == epochs


def test_line_names_the_measure_the_stage_and_the_step(
    tmp_path: Path, prepared: LabelledImages, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {1: 30.0, 2: 12.0, 3: 11.0}
    tiny(tmp_path, prepared, after_epoch=lambda epoch: {KNN: 80.0, RANK: ranks[epoch]}).fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert lines == [
        "warning: tiny: the effective rank of the features fell from 30, its best, to 12, after epoch 2 (step 8)"
    ]


@pytest.mark.parametrize(("images", "fell"), [(16, False), (143, True), (None, True)])
def test_fall_that_chance_explains_is_none(images: int | None, fell: bool) -> None:
    """Two accuracies of 16 images differ by 35 points or less in 95 % of all cases, those of 143 by 11.6."""
    assert bool(fallen([{KNN: 75.0}, {KNN: 56.25}], images)) == fell
    assert fallen([{KNN: 75.0}, {KNN: 39.0}], 16)
