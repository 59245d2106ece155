"""Names of users in pictures."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from lgp.report import figures
from lgp.report.drawing import save, short

NAMES = ["Ba$$in", "$ 5 $", "a_b^c", "猫", "\\frac{", "two\nlines"]


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    texts: list[Text] = []

    def noted(figure: Figure, path: Path) -> None:
        save(figure, path)
        texts.extend(text for text in figure.findobj(Text) if isinstance(text, Text))

    monkeypatch.setattr(figures, "save", noted)
    return texts


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = drawn(monkeypatch)
    label = np.arange(len(NAMES))
    predictions = pd.DataFrame({"label": label, "prediction": label[::-1], "confidence": 0.5})
    figures.plot_confusion(tmp_path / "confusion.png", predictions, NAMES)
    figures.plot_per_class(tmp_path / "classes.png", {"mim": 100.0 * label}, NAMES, "mim", "1 %")
    figures.plot_mistakes(tmp_path / "mistakes.png", np.zeros((6, 4, 4, 1), dtype=np.uint8), predictions, NAMES, "mim")
    assert {text.get_text() for text in texts} >= set(map(short, NAMES))
    named = [text for text in texts if any(short(name) in text.get_text() for name in NAMES)]
    assert len(named) >= 4 * len(NAMES)
    assert not any(text.get_parse_math() for text in named)
    assert all((tmp_path / f"{name}.png").stat().st_size for name in ("confusion", "classes", "mistakes"))


def test_long_names_are_cut_and_leave_room(tmp_path: Path) -> None:
    assert short("a" * 255) == "a" * 24 + "…"
    assert short("two\nlines\x1b") == r"two\nlines\x1b"
    predictions = pd.DataFrame({"label": [0, 1], "prediction": [1, 0]})
    figures.plot_confusion(tmp_path / "confusion.png", predictions, ["a" * 255, "b" * 255])  # a warning is an error
