"""How pictures are drawn: the names of users as they are, in a font that has their letters."""

import warnings
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from lgp.errors import shortened

P = ParamSpec("P")
DPI = 120
LONGEST_NAME = 24  # characters
# fonts with Chinese, Japanese and Korean letters, of Linux, macOS and Windows; those that are there help out
OTHER_LETTERS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "IPAGothic",
    "Hiragino Sans",
    "PingFang SC",
    "Arial Unicode MS",
    "Microsoft YaHei",
    "Malgun Gothic",
)


def with_names(plot: Callable[P, None]) -> Callable[P, None]:
    """Let a function draw names of users as they are: a class "Ba$$in" is no mathematics.

    A letter that no font has is drawn as a box.
    """

    @wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> None:
        with rc_context({"text.parse_math": False, "font.family": _fonts()}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            plot(*args, **kwargs)

    return drawn


@cache
def _fonts() -> list[str]:
    there = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in OTHER_LETTERS if name in there)]


def short(name: str) -> str:
    """Return a name of a user on one line, cut where it is long: an axis would leave no room for the picture."""
    return shortened(name, LONGEST_NAME)


def save(figure: Figure, path: Path) -> None:
    """Save a picture as PNG."""
    figure.savefig(path, dpi=DPI)
