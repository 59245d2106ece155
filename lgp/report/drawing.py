"""How pictures are drawn: the names of users as they are, in a font that has their letters, and saved."""

import warnings
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

DPI = 120
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

_there = {font.name for font in fontManager.ttflist}
# a class may be called "$5" or "Ba$$in": its name is no mathematics
rcParams.update(
    {"text.parse_math": False, "font.family": ["DejaVu Sans", *(name for name in OTHER_LETTERS if name in _there)]}
)


def save(figure: Figure, path: Path) -> None:
    """Save a picture as PNG. A letter that no font has is drawn as a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=DPI)
