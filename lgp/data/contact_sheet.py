"""A picture of some images of each class, with the names below them."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lgp.data.conversion import as_image, decode
from lgp.data.inspection import even
from lgp.data.sources.offers import Offers, Read

IMAGES, COLUMNS = 64, 8
TILE, MARGIN, LINE, TEXT = 96, 8, 18, 12  # in pixels
WITHOUT_LABEL = "(no label)"
UNREADABLE = "cannot be read"
INK, PAPER, PALE = "black", "white", "lightgrey"


def contact_sheet(offers: Offers, channels: int) -> Image.Image:
    """Draw up to 64 images, evenly chosen from the classes, one class after the other.

    Args:
        offers: of the source.
        channels: that images are decoded to. Of more than 4 the first three are drawn.
    """
    chosen = _chosen(offers)
    tiles = dict(zip(sorted(chosen), (_tile(read, channels) for read in offers.reads(sorted(chosen))), strict=True))
    rows = -(-len(chosen) // COLUMNS)
    across, down = TILE + MARGIN, TILE + LINE + MARGIN
    sheet = Image.new("RGB", (min(len(chosen), COLUMNS) * across + MARGIN, rows * down + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, position in enumerate(chosen):
        left, top = MARGIN + number % COLUMNS * across, MARGIN + number // COLUMNS * down
        tile = tiles[position]
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        draw.text((left, top + TILE + 2), _fitting(offers.labels[position] or WITHOUT_LABEL), INK, _font())
    return sheet


def _chosen(offers: Offers) -> list[int]:
    """Return positions, class by class. Of more than 64 classes, some are left out."""
    members: dict[str | None, list[int]] = {}
    for position, label in enumerate(offers.labels):
        members.setdefault(label, []).append(position)
    classes = [name for name in [*offers.classes, None] if name in members]
    classes = [classes[i] for i in even(len(classes), IMAGES)]
    numbers = _shares([len(members[name]) for name in classes], IMAGES)
    return [members[name][i] for name, n in zip(classes, numbers, strict=True) for i in even(len(members[name]), n)]


def _shares(sizes: Sequence[int], wanted: int) -> list[int]:
    """Return how many to take of each: as many of each as possible, together at most `wanted`."""
    taken = [0] * len(sizes)
    while sum(taken) < wanted and taken != list(sizes):
        for i, size in enumerate(sizes):
            if taken[i] < size and sum(taken) < wanted:
                taken[i] += 1
    return taken


def _tile(read: Read, channels: int) -> Image.Image:
    try:
        return thumbnail(decode(read(), channels))
    except Exception:  # noqa: BLE001 - a `Read` may raise any error; the inspection lists it with the reason
        tile = Image.new("RGB", (TILE, TILE), PALE)
        ImageDraw.Draw(tile).text((4, TILE // 2), _fitting(UNREADABLE), INK, _font())
        return tile


def thumbnail(pixels: np.ndarray, side: int = TILE) -> Image.Image:
    """Return an image (H, W, C) uint8 whose longer side is `side` pixels. Small ones are enlarged without blur."""
    image = as_image(_drawable(pixels)).convert("RGB")
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _drawable(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels[..., :3]) if pixels.shape[2] > 4 else pixels


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)


def _fitting(name: str) -> str:
    """Return a name in one line, cut to the width of a tile. Characters that cannot be drawn become `?`."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    font = _font()
    if font.getlength(shown) <= TILE:
        return shown
    while shown and font.getlength(f"{shown}…") > TILE:
        shown = shown[:-1]
    return f"{shown}…"
