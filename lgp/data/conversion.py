"""From what people store as an image to pixels: (H, W, C) uint8, upright, in sRGB.

`data.channels` is 1 (grey), 2 (grey and alpha), 3 (RGB), 4 (RGB and alpha, or any four bands), or more (bands).

| given | result |
|---|---|
| EXIF orientation | the image is turned upright |
| transparency (RGBA, LA, PA, palette, a transparent colour) | 1 and 3 channels: laid on `ground`; 2 and 4: kept |
| palette, 1 bit, CMYK, YCCK, YCbCr | converted by Pillow, which also knows the inverted CMYK of Adobe |
| colour profile (ICC) that is not sRGB | converted to sRGB; a damaged profile, or one of other colours, is ignored |
| whole numbers, 0 to 65,535, of grey or of an array | 0 … 2^k - 1 becomes 0 … 255, rounded |
| their k | the smallest of 8, 10, 12, 14, 16 that holds the image's maximum and is no less than the declared bits |
| declared bits | PNG: `sBIT`. TIFF: `BitsPerSample` below 16, else `MaxSampleValue`. PGM: 16. Otherwise none |
| grey TIFF where 0 is white | inverted |
| colours of 16 bits in a file | the upper 8 bits (Pillow) |
| floats | maximum at most 1: 0 … 1 becomes 0 … 255; at most 255: kept, rounded |
| other numbers: negative, NaN, floats above 255, whole numbers above 65,535 | refused |
| several frames (GIF, WebP, TIFF) | the first |
| more than 4 channels | TIFF: its bands and pages, in order; arrays; they are scaled together |
| other formats, more than 2^27 pixels, a side above 65,535, damaged or cut files | refused |

k depends on the single image: a dark image of 12 bits may be read as one of 10 bits, and is then brighter.

Pixels are converted in strips, so an image takes little more memory than what its decoder makes and the result.
Measured in bytes a pixel, for 3 channels: JPEG, PNG, palettes and CMYK 8, numbers of 32 bits 12, grey of 16 bits with
transparency 14, WebP 16, JPEG 2000 19. So the largest image takes 1.1 GB, as WebP 2.2 GB, as JPEG 2000 2.6 GB. Each
process may read one at the same time.

JPEG is decoded whole, also where `data.store_short_side` makes it smaller: its decoder can halve an image as it reads,
but the pixels are then others than those of the same image as PNG.
"""

import io
import logging
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

GROUND = "white"  # under transparent pixels, as browsers and viewers show them
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
# PostScript and other formats that run programs stay closed. JPEG includes MPO. TGA has no signature and comes last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "ICO", "TGA")
DEPTHS = (8, 10, 12, 14, 16)
MOST_PIXELS = 2**27  # 134 million: a tile of Sentinel-2 has 121 million
STRIP_PIXELS = 2**20  # that are converted at once
LONGEST_SIDE = 65_535
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE = 258, 262, 281  # tags of TIFF
TRANSPOSING = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow finds an orientation

Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # above it, Pillow warns as it opens a file; above twice as many, it raises


class Undecodable(ValueError):  # noqa: N818 - it says what is the case
    """What was given is no image, or one that is not read. The message is a plain reason."""


def decode(data: bytes | np.ndarray, channels: int, ground: str = GROUND) -> np.ndarray:
    """Return the pixels of one image, (H, W, C) uint8, by the rules above.

    Args:
        data: an encoded image, or pixels (H, W) or (H, W, C).
        channels: C of the result.
        ground: the colour under transparent pixels, as Pillow names colours.

    Raises:
        Undecodable: there is no such image in `data`.
    """
    try:
        if isinstance(data, np.ndarray):
            return _of_array(data, channels, ground)
        if not data:
            raise Undecodable("empty")
        return _of_bands(data, channels) if channels > 4 else _of_file(data, channels, ground)
    except Undecodable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Undecodable(f"more than {MOST_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise Undecodable(_unknown(data)) from None
    except MemoryError:
        raise Undecodable("too large for the memory") from None
    except Exception as error:  # decoders of damaged files raise any exception
        raise Undecodable(f"damaged: {plain(error)}") from error


def plain(error: Exception) -> str:
    """Return the text of an error, without what differs from run to run (addresses in memory, places of files)."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "an object", str(error)).split())
    return text or f"the decoder stopped without a reason ({type(error).__name__})"


def encode(pixels: np.ndarray) -> bytes:
    """Encode pixels (H, W, C) uint8 without loss: as PNG, with more than 4 channels as TIFF."""
    buffer = io.BytesIO()
    if pixels.shape[2] in MODES:
        as_image(pixels).save(buffer, "png", compress_level=1)
    else:
        import tifffile

        tifffile.imwrite(buffer, pixels, photometric="minisblack", planarconfig="contig", compression="zlib")
    return buffer.getvalue()


def as_image(pixels: np.ndarray) -> Image.Image:
    """Return pixels (H, W, C) uint8 of at most 4 channels as Pillow's image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def shrink(pixels: np.ndarray, short_side: int) -> np.ndarray:
    """Resize pixels (H, W, C) uint8, antialiased, to a shorter side of `short_side`."""
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    if pixels.shape[2] in (1, 3):
        return np.atleast_3d(np.asarray(as_image(pixels).resize(size, Image.Resampling.BICUBIC)))
    bands = [Image.fromarray(band).resize(size, Image.Resampling.BICUBIC) for band in np.moveaxis(pixels, 2, 0)]
    return np.stack([np.asarray(band) for band in bands], axis=2)


def _unknown(data: bytes | np.ndarray) -> str:
    if isinstance(data, bytes) and data[:4] in TIFF_STARTS:
        return "a damaged TIFF, or one of bands: data.channels must then be the number of bands"
    return f"damaged, or none of the known formats ({', '.join(FORMATS)})"


def _check_sides(width: int, height: int) -> None:
    if min(width, height) < 1 or max(width, height) > LONGEST_SIDE:
        raise Undecodable(f"{width} × {height} pixels: sides are from 1 to {LONGEST_SIDE:,}")
    if width * height > MOST_PIXELS:
        raise Undecodable(f"more than {MOST_PIXELS:,} pixels")


def _check_bands(width: int, height: int, bands: int) -> None:
    if width * height * bands > 4 * MOST_PIXELS:
        raise Undecodable(f"more than {4 * MOST_PIXELS:,} values in {bands} bands")


def _of_array(values: np.ndarray, channels: int, ground: str) -> np.ndarray:
    if values.ndim not in (2, 3):
        raise Undecodable(f"an array of shape {values.shape}: expected (H, W) or (H, W, C)")
    values = np.atleast_3d(values)
    height, width, given = values.shape
    _check_sides(width, height)
    _check_bands(width, height, given)
    if given != channels and (given not in MODES or channels not in MODES):
        raise Undecodable(f"{given} channels, data.channels is {channels}")
    pixels = _eight_bits(values, declared=8)
    return pixels if given == channels else _in_strips(as_image(pixels), channels, ground)


def _of_bands(data: bytes, channels: int) -> np.ndarray:
    """Read the bands and pages of a TIFF. Pillow knows at most 4 bands."""
    if data[:4] not in TIFF_STARTS:
        raise Undecodable(f"not a TIFF: no other format holds the {channels} channels of data.channels")
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        down, across = series.axes.index("Y"), series.axes.index("X")
        height, width = series.shape[down], series.shape[across]
        _check_sides(width, height)
        _check_bands(width, height, channels)
        if series.size != height * width * channels:
            raise Undecodable(f"{series.size // (height * width)} channels, data.channels is {channels}")
        bands = np.moveaxis(series.asarray(), (down, across), (0, 1)).reshape(height, width, channels)
    return _eight_bits(bands, declared=8)


def _of_file(data: bytes, channels: int, ground: str) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_sides(*image.size)
            image.load()
            _turn_upright(image)
            return _in_strips(_with_eight_bits(image, data), channels, ground)


def _turn_upright(image: Image.Image) -> None:
    if not any(place in image.info for place in TRANSPOSING):
        return
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # noqa: BLE001 - damaged metadata of a sound image raise any exception
        return


def _with_eight_bits(image: Image.Image, data: bytes) -> Image.Image:
    """Return an image of 16 or 32 bits per pixel in grey, with alpha if one value is transparent."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    grey = _eight_bits(values, _declared_bits(image, data))
    if isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == 0:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey = np.stack([grey, np.where(values == transparent, 0, 255).astype(np.uint8)], axis=2)
    return Image.fromarray(grey)


def _eight_bits(values: np.ndarray, declared: int) -> np.ndarray:
    """Scale numbers to uint8. `declared` is the least number of bits."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return np.where(values, np.uint8(255), np.uint8(0))
    if values.dtype.kind not in "iuf":
        raise Undecodable(f"an array of {values.dtype}: expected whole numbers or floats")
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # also where one is NaN
            raise Undecodable(f"floats from {low:g} to {high:g}: they must lie in [0, 1] or in [0, 255]")
        factor = 255 if high <= 1 else 1
        return _of_rows(values, lambda rows: np.rint(rows * factor))
    if low < 0 or high > 65_535:
        raise Undecodable(f"whole numbers from {low} to {high}: they must lie in 0 … 65535")
    most = (1 << next(bits for bits in DEPTHS if bits >= declared and high < 1 << bits)) - 1
    scaled = ((np.arange(most + 1) * 255 + most // 2) // most).astype(np.uint8)
    return _of_rows(values, lambda rows: scaled[rows])


def _of_rows(values: np.ndarray, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Convert numbers (H, W) or (H, W, C) to uint8, a strip of rows at a time."""
    converted = np.empty(values.shape, dtype=np.uint8)
    for top, end in _strips(values.shape[0], math.prod(values.shape[1:])):
        converted[top:end] = convert(values[top:end])
    return converted


def _strips(height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield first and last row of each strip of about `STRIP_PIXELS`. Most images are one strip."""
    rows = max(STRIP_PIXELS // width, 1)
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def _declared_bits(image: Image.Image, data: bytes) -> int:
    """Return the bits per pixel that a grey file of more than 8 bits declares, at most 16; 8 if it does not."""
    declared = 8
    if image.format == "PNG":
        declared = _significant_bits(data)
    elif image.format == "PPM":
        declared = 16  # Pillow has scaled the declared maximum to 65,535
    elif isinstance(image, TiffImageFile):
        bits, most = (np.ravel(image.tag_v2.get(tag, 0))[0] for tag in (BITS_PER_SAMPLE, MAX_SAMPLE_VALUE))
        declared = int(bits) if bits < 16 else int(most).bit_length()
    return min(max(declared, 8), 16)


def _significant_bits(png: bytes) -> int:
    """Return what the chunk `sBIT` of a grey PNG says, 8 without one. It stands before the pixels."""
    place = 8
    while place + 9 <= len(png):
        length, name = struct.unpack_from(">I4s", png, place)
        if name == b"sBIT":
            return png[place + 8]
        if name == b"IDAT":
            break
        place += 12 + length
    return 8


def _in_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode == "P":
        image = image.convert("RGB")
    transform = _to_srgb(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile's colours to sRGB, None if there is nothing to do."""
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(given).lower():
            return None
        return ImageCms.buildTransform(given, _srgb(), mode, "RGBA" if mode == "RGBA" else "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _in_strips(image: Image.Image, channels: int, ground: str) -> np.ndarray:
    """Return the pixels of an image of 8 bits in sRGB, (H, W, C) uint8, without copies of the whole image."""
    width, height = image.size
    pixels = np.empty((height, width, channels), dtype=np.uint8)
    for top, end in _strips(height, width):
        strip = image if (top, end) == (0, height) else image.crop((0, top, width, end))
        pixels[top:end] = _with_channels(_in_srgb(strip), channels, ground)
    return pixels


def _with_channels(image: Image.Image, channels: int, ground: str) -> np.ndarray:
    if channels in (2, 4):
        if image.mode != MODES[channels]:
            image = image.convert("RGBA").convert(MODES[channels])
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image.convert("RGBA"))
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    pixels = np.asarray(image)
    return pixels[..., None] if channels == 1 else pixels
