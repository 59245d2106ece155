"""Pictures of images of any number of channels, and of classes of any name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lgp.report.figures import confusion, plot_confusion, plot_mistakes, plot_per_class, plot_reconstructions

MISTAKES = pd.DataFrame({"label": [0, 1], "prediction": [1, 0], "confidence": [0.9, 0.8]})


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_of_any_number_of_channels_are_drawn(tmp_path: Path, channels: int) -> None:
    images = np.full((2, 8, 8, channels), 90, dtype=np.uint8)
    plot_mistakes(tmp_path / "mistakes.png", images, MISTAKES, ["a", "b"], "graft")
    tensors = dict.fromkeys(("original", "masked", "painted"), torch.rand(2, channels, 8, 8))
    plot_reconstructions(tmp_path / "reconstructions.png", tensors)
    assert {path.name for path in tmp_path.iterdir()} == {"mistakes.png", "reconstructions.png"}


@pytest.mark.parametrize(
    "draw",
    [
        lambda path, names: plot_mistakes(path, np.zeros((2, 8, 8, 1), np.uint8), MISTAKES, names, "graft"),
        lambda path, names: plot_confusion(path, MISTAKES, names),
        lambda path, names: plot_per_class(path, {"graft": np.array([50.0, 40.0])}, names, "graft", "1 %"),
    ],
    ids=["mistakes", "confusion", "per_class"],
)
def test_dollars_in_a_name_begin_no_formula(tmp_path: Path, draw: Callable[[Path, list[str]], None]) -> None:
    draw(tmp_path / "a.png", ["$_$", "a$x^$"])
    assert (tmp_path / "a.png").exists()


def test_confusion_is_in_percent_of_the_true_class() -> None:
    predictions = pd.DataFrame({"label": [0, 0, 0, 1], "prediction": [0, 0, 1, 2]})
    share, together = confusion(predictions, 4)
    assert together == 1
    assert share == pytest.approx(np.array([[200 / 3, 100 / 3, 0, 0], [0, 0, 100, 0], [0] * 4, [0] * 4]))


@pytest.mark.parametrize(("classes", "together", "cells"), [(250, 1, 250), (251, 2, 126), (3000, 12, 250)])
def test_confusion_of_many_classes_is_of_neighbours_together(classes: int, together: int, cells: int) -> None:
    last = classes - 1
    share, found = confusion(pd.DataFrame({"label": [0, last, last], "prediction": [last, last, 0]}), classes)
    assert (found, share.shape) == (together, (cells, cells))
    assert [share[0, -1], share[-1, -1], share[-1, 0], share.sum()] == [100, 50, 50, 200]
