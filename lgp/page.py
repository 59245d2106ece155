"""A page as Markdown, and the same as one HTML file that works offline."""

import base64
import re
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
img { max-width: 100%; }
code { background: #f3f3f3; padding: 0 .2rem; }
@media (prefers-color-scheme: dark) {
  body { background: #1c1c1c; color: #ddd; } code { background: #333; } img { background: #fff; }
}
"""


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def to_html(markdown: str, title: str, folder: Path) -> str:
    """Render Markdown to one HTML file with everything in it, pictures too.

    Args:
        markdown: with tables.
        title: of the window.
        folder: the pictures' paths begin here; each is there.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inlined(found: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / found[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="([^"]+\.png)"', inlined, body)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n'
