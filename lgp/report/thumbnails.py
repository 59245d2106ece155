"""A page of thumbnails: one HTML file that works offline."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np

from lgp.data.contact_sheet import thumbnail

SIDE = 160  # of a thumbnail, in pixels
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
section { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: 160px; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { background: #1c1c1c; color: #ddd; } }
"""


def thumbnail_page(title: str, body: Sequence[str]) -> str:
    """Return a page of a title and lines of HTML."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return "\n".join(
        [
            f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>',
            *body,
            "</body></html>\n",
        ]
    )


def figure(pixels: np.ndarray, caption: str) -> str:
    """Return an image (H, W, C) uint8 and a text below it, as HTML."""
    file = io.BytesIO()
    thumbnail(pixels, SIDE).save(file, "JPEG", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt=""><figcaption>{escape(caption)}</figcaption></figure>'
    )
