"""Image files that somebody broke, among whole ones."""

import random
import struct
import zlib
from pathlib import Path

from manifests import broken
from sources import picture, prepare
from tried import Tried, Wrong, tried

FORMS = {  # suffix → format of Pillow, mode
    "png": ("png", "RGB"), "L.png": ("png", "L"), "P.png": ("png", "P"), "A.png": ("png", "RGBA"),
    "I16.png": ("png", "I;16"), "jpg": ("jpeg", "RGB"), "cmyk.jpg": ("jpeg", "CMYK"), "gif": ("gif", "P"),
    "webp": ("webp", "RGB"), "bmp": ("bmp", "RGB"), "ppm": ("ppm", "RGB"), "tiff": ("tiff", "RGB"),
    "F.tif": ("tiff", "F"),
}  # fmt: skip
WHOLE = 6


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _bomb(rng: random.Random) -> bytes:
    """Return a PNG that declares many pixels and has few, or has them all in a few bytes."""
    width, height = rng.choice(
        ((40_000, 40_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 0), (11_000, 12_000), (70_000, 9))
    )
    depth, colour = rng.choice(((1, 0), (8, 0), (16, 0), (8, 2), (8, 3), (8, 6), (3, 9)))
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 1, 7))))
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(rng.choice((9, 90_000_000)))))
    pixels = _chunk(b"IDAT", zlib.compress(bytes(rng.choice((0, 9, 20_000_000)))))
    return b"\x89PNG\r\n\x1a\n" + header + rng.choice((b"", text)) + pixels + _chunk(b"IEND", b"")


def _encoded(rng: random.Random, suffix: str) -> bytes:
    form, mode = FORMS[suffix]
    return picture(rng, form, mode, (rng.choice((1, 8, 40)), rng.choice((1, 8, 40))))


def _header(rng: random.Random, data: bytes) -> bytes:
    """Return data with numbers in its first bytes replaced."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 2, 5))):
        place = rng.randrange(min(len(result), 120))
        result[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(result)


def attack(rng: random.Random, folder: Path) -> Tried:
    """Put a few broken files among whole ones, and prepare the folder."""
    source = folder / "source"
    how = rng.choice(("bytes", "header", "suffix", "bomb"))
    for number in range(WHOLE):
        (source / "train" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (source / "train" / "ab"[number % 2] / f"whole-{number}.png").write_bytes(picture(rng))
    for number in range(4):
        suffix = rng.choice(list(FORMS))
        data = _bomb(rng) if how == "bomb" else _encoded(rng, suffix)
        data = {"bytes": broken, "header": _header}.get(how, lambda _, whole: whole)(rng, data)
        named = rng.choice(list(FORMS)) if how == "suffix" else "png" if how == "bomb" else suffix
        (source / "train" / "a" / f"{number}.{named}").write_bytes(data)

    def work() -> None:
        images = prepare(str(source), folder)
        if found := {f"whole-{n}.png" for n in range(WHOLE)} - {Path(path).name for path in images.paths}:
            raise Wrong(f"whole images are missing: {found}")

    return tried(how, work, folder)
