"""From files and arrays of every kind to pixels of 8 bits."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from lgp.data import conversion
from lgp.data.conversion import Undecodable, decode, encode, shrink

RNG = np.random.default_rng(0)


def encoded(image: Image.Image | np.ndarray, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def as_tiff(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


# one row: half transparent black, opaque black, hidden red
COVERED = Image.fromarray(np.array([[[0, 0, 0, 128], [0, 0, 0, 255], [255, 0, 0, 0]]], dtype=np.uint8))
KINDS = {
    "RGBA": encoded(COVERED),
    "LA": encoded(COVERED.convert("LA")),
    "PA": encoded(COVERED.convert("PA"), "tiff"),
    "palette": encoded(COVERED.quantize(3)),
    "webp": encoded(COVERED, "webp", lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transparent_pixels_lie_on_white(kind: str) -> None:
    assert decode(KINDS[kind], 1).tolist() == [[[127], [0], [255]]]
    assert decode(KINDS[kind], 3).tolist() == [[[127] * 3, [0] * 3, [255] * 3]]


def test_ground_may_be_another_colour() -> None:
    assert decode(KINDS["RGBA"], 3, ground="black").max() == 0
    assert decode(np.asarray(COVERED), 3, ground="black").max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_is_kept_where_it_is_a_channel(kind: str) -> None:
    assert decode(KINDS[kind], 2)[0, :, 1].tolist() == [128, 255, 0]
    assert decode(KINDS[kind], 4)[0, :, 3].tolist() == [128, 255, 0]
    assert decode(encoded(noise(4, 5)), 4)[..., 3].min() == 255


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_transparent_colour_lies_on_white(mode: str) -> None:
    black = (0, 0, 0) if mode == "RGB" else 0
    data = encoded(Image.fromarray(np.array([[0, 9]], dtype=np.uint8)).convert(mode), transparency=black)
    assert decode(data, 1).tolist() == [[[255], [9]]]
    assert decode(data, 2)[..., 1].tolist() == [[0, 255]]


def test_transparent_value_of_sixteen_bits_lies_on_white() -> None:
    data = encoded(np.array([[0, 65535, 257]], dtype=np.uint16), transparency=257)
    assert decode(data, 1)[..., 0].tolist() == [[0, 255, 255]]
    assert decode(data, 2)[..., 1].tolist() == [[255, 255, 0]]


def test_images_without_transparency_keep_their_pixels() -> None:
    pixels = noise(4, 5)
    opaque = np.concatenate([pixels, np.full((4, 5, 1), 255, dtype=np.uint8)], axis=2)
    for given in (pixels, opaque):
        for data in (given, encoded(given), encoded(given, "webp", lossless=True), encoded(given, "tga")):
            assert np.array_equal(decode(data, 3), pixels)
    grey = noise(4, 5, 1)
    for kind in ("png", "bmp", "tiff", "ppm", "gif", "jpeg2000"):
        assert np.array_equal(decode(encoded(grey[..., 0], kind), 1), grey), kind
    assert np.array_equal(decode(grey, 3), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_photographs_are_turned_upright(kind: str) -> None:
    image = Image.fromarray(np.vstack([np.zeros((8, 16), np.uint8), np.full((8, 16), 255, np.uint8)])).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6
    pixels = decode(encoded(image, kind, exif=exif), 1)
    assert pixels[:, 0].min() > 250  # what was below is left
    assert pixels[:, -1].max() < 5


def test_damaged_metadata_is_ignored() -> None:
    pixels = noise(8, 8)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0"):
        assert np.array_equal(decode(encoded(pixels, exif=exif), 3), pixels)
    assert np.array_equal(decode(encoded(pixels, icc_profile=b"no profile"), 3), pixels)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_sixteen_bits_hold_the_range_of_the_brightest(bits: int) -> None:
    most = 2**bits - 1
    values = np.array([[0, most // 3, most]], dtype=np.uint16)
    for data in (values, values[..., None], encoded(values), encoded(values, "tiff")):
        assert decode(data, 1)[..., 0].tolist() == [[0, 85, 255]]


def test_sixteen_bits_of_a_microscope_keep_their_grey_levels() -> None:
    grey = np.arange(256, dtype=np.uint16)[None]
    assert decode(encoded((grey << 4) | (grey >> 4)), 1)[0, :, 0].tolist() == list(range(256))
    assert decode(encoded(grey * 257), 1)[0, :, 0].tolist() == list(range(256))


def test_declared_bits_stand_above_the_brightest() -> None:
    values = np.array([[0, 1023]], dtype=np.uint16)
    png = encoded(values)
    assert decode(png, 1).max() == 255
    declared = png[:33] + chunk(b"sBIT", b"\x0c") + png[33:]  # after the header
    assert decode(declared, 1).max() == 64  # 1023 of 4095
    assert decode(as_tiff(values, extratags=[(281, 3, 1, 4095, True)]), 1).max() == 64
    assert decode(b"P5 2 1 4095\n" + values.astype(">u2").tobytes(), 1).max() == 64
    assert decode(b"P5 1 1 4095\n" + b"\0\x0f", 1).max() == 1  # 15 of 4095


def test_grey_tiff_where_zero_is_white_is_inverted() -> None:
    values = np.array([[0, 65535]], dtype=np.uint16)
    assert decode(as_tiff(values, photometric="miniswhite"), 1)[..., 0].tolist() == [[255, 0]]


def test_floats_of_a_known_range_are_scaled() -> None:
    for values, expected in (([0, 0.5, 1], [0, 128, 255]), ([0, 0.6, 255], [0, 1, 255])):
        floats = np.array([values], dtype=np.float32)
        for data in (floats, floats.astype(np.float64), encoded(floats, "tiff")):
            assert decode(data, 1)[..., 0].tolist() == [expected]


@pytest.mark.parametrize("value", [-0.1, 255.5, float("nan"), float("inf")])
def test_floats_of_unknown_range_are_refused(value: float) -> None:
    floats = np.array([[0, value]], dtype=np.float32)
    for data in (floats, encoded(floats, "tiff")):
        with pytest.raises(Undecodable, match=r"they must lie in \[0, 1\] or in \[0, 255\]"):
            decode(data, 1)


def test_whole_numbers_of_32_bits_are_as_those_of_16() -> None:
    assert decode(encoded(np.array([[0, 65535]], dtype=np.int32), "tiff"), 1).max() == 255
    for value in (-1, 65536):
        with pytest.raises(Undecodable, match=r"they must lie in 0 … 65535"):
            decode(encoded(np.array([[0, value]], dtype=np.int32), "tiff"), 1)


def test_colours_of_other_storage_are_converted() -> None:
    red = Image.new("RGB", (8, 8), (254, 0, 0))
    for kind, mode in (("jpeg", "CMYK"), ("tiff", "CMYK"), ("gif", "P"), ("tiff", "YCbCr")):
        pixels = decode(encoded(red.convert(mode), kind), 3)
        assert np.abs(pixels.astype(int) - [254, 0, 0]).max() <= 4, (kind, mode)
    bits = decode(encoded(Image.fromarray(np.eye(8) > 0)), 1)
    assert np.array_equal(bits[..., 0], np.eye(8) * 255)
    assert np.array_equal(decode(np.eye(8) > 0, 1), bits)


def profile(swapped: bool) -> bytes:
    """Return the profile sRGB under another name, with red and green swapped or not."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data[:] = data.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    names = {data[132 + 12 * i : 136 + 12 * i].decode(): 132 + 12 * i for i in range(data[131])}
    red, green = names["rXYZ"], names["gXYZ"]
    if swapped:
        data[red : red + 4], data[green : green + 4] = data[green : green + 4], data[red : red + 4]
    return bytes(data)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_embedded_profile_is_followed(mode: str) -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 0)).convert(mode)
    pixels = decode(encoded(image, icc_profile=profile(swapped=True)), 3)
    assert np.abs(pixels.astype(int) - [0, 255, 0]).max() <= 2
    assert decode(encoded(image, icc_profile=profile(swapped=False)), 3)[0, 0].tolist() == [255, 0, 0]


def test_profile_keeps_alpha_and_one_of_other_colours_is_ignored() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 77))
    assert decode(encoded(image, icc_profile=profile(swapped=True)), 4)[0, 0, 3] == 77
    grey = noise(4, 4, 1)
    assert np.array_equal(decode(encoded(grey[..., 0], icc_profile=profile(swapped=True)), 1), grey)


def test_first_frame_is_taken() -> None:
    frames = [Image.new("L", (4, 4), value) for value in (200, 100)]
    for kind in ("gif", "tiff", "png", "webp"):
        more = {"lossless": True} if kind == "webp" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **more)
        assert (decode(data, 1) == 200).all(), kind


@pytest.mark.parametrize("layout", ["contig", "separate", "pages"])
def test_bands_and_pages_of_a_tiff_are_channels(layout: str) -> None:
    bands = noise(6, 7, 13)
    if layout == "pages":
        data = as_tiff(np.moveaxis(bands, 2, 0), photometric="minisblack", metadata=None)
    else:
        given = bands if layout == "contig" else np.moveaxis(bands, 2, 0)
        data = as_tiff(given, photometric="minisblack", planarconfig=layout)
    assert np.array_equal(decode(data, 13), bands)
    with pytest.raises(Undecodable, match=r"13 channels, data\.channels is 12"):
        decode(data, 12)


def test_bands_are_scaled_together() -> None:
    bands = np.zeros((4, 4, 5), dtype=np.uint16)
    bands[..., 0], bands[..., 4] = 1000, 10_000
    for data in (bands, as_tiff(bands, photometric="minisblack", planarconfig="contig")):
        assert decode(data, 5)[0, 0].tolist() == [16, 0, 0, 0, 156]  # of 16,383


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_encoding_loses_nothing(channels: int) -> None:
    pixels = noise(5, 7, channels)
    decoded = decode(encode(pixels), channels)
    assert np.array_equal(decoded, pixels)
    assert decoded.flags.writeable


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_shrinking_keeps_the_form(channels: int) -> None:
    pixels = np.full((40, 61, channels), 77, dtype=np.uint8)
    assert shrink(pixels, 20).shape == (20, 30, channels)
    assert (shrink(pixels, 20) == 77).all()
    assert shrink(noise(300, 2, channels), 1).shape == (150, 1, channels)


def header(width: int, height: int) -> bytes:
    """Return a PNG of that size without pixels."""
    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "channels", "reason"),
    [
        (b"", 3, "^empty$"),
        (b"not an image", 3, "^damaged, or none of the known formats"),
        (b"%PDF-1.4\n%\xe2\xe3", 3, "none of the known formats"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 3, "none of the known formats"),
        (header(20_000, 20_000), 3, "^more than 134,217,728 pixels$"),
        (header(50_000, 50_000), 3, "^more than 134,217,728 pixels$"),
        (header(70_000, 1), 3, "^70000 × 1 pixels: sides are from 1 to 65,535$"),
        (np.zeros((0, 4), np.uint8), 1, "^4 × 0 pixels"),
        (np.zeros((4, 4, 5), np.uint8), 3, r"^5 channels, data\.channels is 3$"),
        (np.zeros((4, 4, 3), np.uint8), 5, r"^3 channels, data\.channels is 5$"),
        (np.zeros(4, np.uint8), 1, r"^an array of shape \(4,\)"),
        (np.zeros((4, 4), "U1"), 1, "^an array of <U1"),
        (encoded(noise(4, 4)), 5, "^not a TIFF"),
        (encode(noise(4, 4, 9)), 3, r"data\.channels must then be the number of bands"),
    ],
)
def test_what_is_no_image_is_refused_with_a_reason(data: bytes | np.ndarray, channels: int, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason):
        decode(data, channels)


def test_large_sound_images_are_no_bombs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(encoded(Image.new("1", (12_000, 9_000))), 1).shape == (9_000, 12_000, 1)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "jpeg2000", "ppm", "ico", "tga"])
def test_cut_and_damaged_files_have_a_plain_reason(kind: str) -> None:
    whole = encoded(noise(32, 32), kind)
    cuts = [whole[: len(whole) * share // 8] for share in range(1, 8)]
    places = RNG.integers(0, len(whole), 30).tolist()
    damaged = [whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :] for i in places]
    reasons = []
    for data in cuts + damaged:
        try:
            decode(data, 3)
        except Undecodable as error:
            reasons.append(str(error))
    assert len(reasons) >= 5
    assert all(len(reason) > 4 and " at 0x" not in reason for reason in reasons)


def test_reason_of_a_file_names_no_place() -> None:
    assert conversion.plain(FileNotFoundError(2, "No such file or directory", "/pictures/x.png")) == (
        "No such file or directory"
    )
    assert conversion.plain(OSError("cannot identify image file <_io.BytesIO object at 0x7f12>")) == (
        "cannot identify image file an object"
    )
    assert conversion.plain(IndexError()) == "the decoder stopped without a reason (IndexError)"


def in_mode(mode: str) -> bytes:
    """An image of noise, 23×31, as a file of this mode of Pillow."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    colours = Image.fromarray(rng.integers(0, 256, (31, 23, 4), dtype=np.uint8))
    if mode in ("I", "F", "I;16"):
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        Image.fromarray(rng.integers(0, 250, (31, 23)).astype(kind)).save(buffer, "tiff")
    elif mode == "transparent palette":
        colours.convert("RGB").convert("P").save(buffer, "png", transparency=3)
    elif mode == "transparent colour":
        colours.convert("L").save(buffer, "png", transparency=7)
    elif mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        colours.convert("RGB").save(buffer, "png", exif=exif)
    else:
        colours.convert(mode).save(buffer, "tiff")
    return buffer.getvalue()


MADE = (
    "1", "L", "LA", "RGB", "RGBA", "CMYK", "I", "F", "I;16", "transparent palette", "transparent colour", "turned"
)  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", MADE)
def test_strips_change_no_pixel(mode: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = in_mode(mode)
    whole = decode(data, channels)
    monkeypatch.setattr(conversion, "STRIP_PIXELS", 100)
    assert np.array_equal(decode(data, channels), whole)


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_strips_change_no_number_of_bands(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    bands = np.random.default_rng(0).integers(0, 250, (31, 23, 6)).astype(kind)
    whole = decode(bands, 6)
    monkeypatch.setattr(conversion, "STRIP_PIXELS", 100)
    assert np.array_equal(decode(bands, 6), whole)


def test_values_of_many_bands_are_bounded() -> None:
    bands = np.broadcast_to(np.uint8(0), (8192, 8192, 64))
    with pytest.raises(Undecodable, match="more than 536,870,912 values in 64 bands"):
        decode(bands, 64)


PEAK = """
import io, re
from pathlib import Path
import numpy as np
from PIL import Image
from lgp.data.conversion import decode

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

buffer = io.BytesIO()
Image.new("RGBA", (64, 64)).save(buffer, "png")
decode(buffer.getvalue(), 3)
data = Path("{file}").read_bytes()
before = peak()
decode(data, 3)
print((peak() - before) / 3000**2)
"""


def test_bytes_that_a_large_image_takes_are_bounded(tmp_path: Path) -> None:
    """Four for the pixels of the decoder, and three for the result."""
    Image.new("RGBA", (3000, 3000)).save(tmp_path / "large.png", compress_level=1)
    command = [sys.executable, "-c", PEAK.replace("{file}", str(tmp_path / "large.png"))]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=surroundings, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 10
