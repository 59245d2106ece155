"""One folder with everything that folders really have: each file has its stated outcome, and none is lost."""

import csv
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_sources import images_from
from PIL import Image

from lgp.data.storage import Images
from lgp.params.file import Params

RNG = np.random.default_rng(0)


def picture(mode: str = "RGB", size: tuple[int, int] = (16, 12)) -> Image.Image:
    """Make noise of another content each time."""
    return Image.fromarray(RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


def encoded(form: str, image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(side: int) -> bytes:
    """Make a PNG of a few bytes that declares side × side pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("jpeg", picture(), exif=exif)


def frames() -> bytes:
    return encoded("gif", picture("P"), save_all=True, append_images=[picture("P")])


READ: dict[str, Callable[[], bytes]] = {
    "rgb.png": lambda: encoded("png", picture()),
    "grey.PNG": lambda: encoded("png", picture("L")),
    "one bit.png": lambda: encoded("png", picture("1")),
    "alpha.png": lambda: encoded("png", picture("RGBA")),
    "grey and alpha.png": lambda: encoded("png", picture("LA")),
    "palette.png": lambda: encoded("png", picture("P"), transparency=0),
    "16 bit.png": lambda: encoded("png", Image.fromarray(RNG.integers(0, 4096, (12, 16), dtype=np.uint16))),
    "float.tiff": lambda: encoded("tiff", Image.fromarray(RNG.random((12, 16), dtype=np.float32))),
    "cmyk.jpg": lambda: encoded("jpeg", picture("CMYK")),
    "turned.JPEG": turned,
    "frames.gif": frames,
    "a.webp": lambda: encoded("webp", picture()),
    "a.bmp": lambda: encoded("bmp", picture()),
    "a.ppm": lambda: encoded("ppm", picture()),
    "no ending": lambda: encoded("png", picture()),
    "png in truth.jpg": lambda: encoded("png", picture()),
    "one pixel.png": lambda: encoded("png", picture(size=(1, 1))),
    "long strip.png": lambda: encoded("png", picture(size=(1, 8000))),
    "'quoted' $x & <b>.png": lambda: encoded("png", picture()),
    "new\nline.png": lambda: encoded("png", picture()),
    "猫🐈.png": lambda: encoded("png", picture()),
    "é" * 120 + ".png": lambda: encoded("png", picture()),
    "odd \udcff.png": lambda: encoded("png", picture()),
}
UNREADABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty.png": (lambda: b"", "empty"),
    "text.jpg": (lambda: b"this is no picture", "none of the known formats"),
    "page.png": (lambda: b"<html><body>404</body></html>", "none of the known formats"),
    "cut.jpg": (lambda: encoded("jpeg", picture(size=(200, 200)))[:2000], "damaged"),
    "cut.png": (lambda: encoded("png", picture(size=(200, 200)))[:2000], "damaged"),
    "postscript.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of the known formats"),
    "bomb.png": (lambda: bomb(40_000), "more than 134,217,728 pixels"),
    "side.png": (lambda: bomb(70_000), "pixels"),
    "negative.tiff": (lambda: encoded("tiff", Image.fromarray(np.full((9, 9), -1, np.float32))), "floats from -1"),
    "number.tiff": (lambda: encoded("tiff", Image.fromarray(np.full((9, 9), np.nan, np.float32))), "floats from nan"),
}
LISTED = {
    "Thumbs.db": "operating system",
    ".DS_Store": "operating system",
    "._rgb.png": "operating system",
    "notes.txt": "no image by its name (.txt)",
    "drawing.svg": "no image by its name (.svg)",
    "figure.eps": "no image by its name (.eps)",
    "film.mp4": "no image by its name (.mp4)",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder, in classes, with links, a pipe, and a class folder of its own."""
    root = tmp_path / "images"
    for name in ("ant", "bee"):
        (root / "train" / name).mkdir(parents=True)
    ant = root / "train" / "ant"
    made = {name: make() for name, make in READ.items()} | {name: make() for name, (make, _) in UNREADABLE.items()}
    for name, data in {**made, **dict.fromkeys(LISTED, b"x")}.items():
        (ant / name).write_bytes(data)
    (ant / "again.png").write_bytes(made["rgb.png"])  # the same image twice is two images
    for i in range(8):
        (root / "train" / "bee" / f"{i}.png").write_bytes(encoded("png", picture()))
    (ant / "gone.png").symlink_to("nowhere.png")
    (ant / "self.png").symlink_to("self.png")
    (ant / "up").symlink_to(root)
    (ant / "linked.png").symlink_to("rgb.png")
    os.mkfifo(ant / "pipe.png")
    (root / "stray.png").write_bytes(encoded("png", picture()))
    return root


@pytest.mark.parametrize("storage", ["copy", "reference"])
def test_each_file_has_its_stated_outcome(folder: Path, tmp_path: Path, params: Params, storage: str) -> None:
    changes = {"max_unreadable_share": 0.5, "channels": 3, "storage": storage}
    metrics, images = images_from(folder, tmp_path / "prepared", params, **changes)
    read = {Path(path).name for path in images.paths}
    of_bee = {f"{i}.png" for i in range(8)}
    assert read - of_bee == {*(n.replace("\udcff", "\\xff") for n in READ), "again.png", "linked.png"}
    with (images.folder / "skipped.csv").open(encoding="utf-8", newline="") as file:
        reasons = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    for name, (_, reason) in UNREADABLE.items():
        assert reason in reasons.pop(name)
    for name, reason in LISTED.items():
        assert reason in reasons.pop(name)
    assert reasons.pop("gone.png") == "a link to nothing"
    assert reasons.pop("self.png") == "a link to nothing"
    assert reasons.pop("pipe.png").startswith("neither a file nor a folder")
    assert reasons.pop("up").startswith("a link to a folder that is read anyway")
    assert reasons.pop("stray.png").startswith("beside folders of splits")
    assert not reasons
    assert len(metrics["unreadable"]) == len(UNREADABLE)
    check_pixels(images)


def check_pixels(images: Images) -> None:
    """Check that every image arrives, in the form of the encoder's input, and upright."""
    squares = images.whole(np.arange(len(images.paths)))
    assert squares.shape[1:] == (3, images.image_size, images.image_size)
    sizes = {Path(path).name: tuple(size) for path, size in zip(images.paths, images.sizes.tolist(), strict=True)}
    assert sizes["turned.JPEG"] == (16, 12)
    assert sizes["rgb.png"] == (12, 16)
    assert sizes["long strip.png"] == (8000, 1)
