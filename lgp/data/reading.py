"""Reading the images of a source in processes: each is read and decoded once, and they come back in order."""

import functools
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lgp.compute.processes import cores, pool
from lgp.data.conversion import as_image, decode, encode, plain, shrink
from lgp.data.leaks import perceptual_hashes
from lgp.data.sources.offers import Read, bytes_of, read_file
from lgp.data.statistics import sums_of
from lgp.data.stored import RESAMPLING, square
from lgp.errors import LgpError

FEW = 256  # images for which no process is started
MOST = 256  # images of a chunk
CHUNK_BYTES, IN_FLIGHT_BYTES = 8 * 2**20, 256 * 2**20  # of a chunk, if it has more than one image, and of all chunks
UNKNOWN_BYTES = 2**20  # that an image counts whose `Read` does not say its size
HASHED_BYTES = 16 * 2**20  # of pixels whose hashes are taken together
QUALITY = 95  # of images that are made smaller and become JPEG


@dataclass(frozen=True)
class Wanted:
    """What is made of an image.

    Attributes:
        channels: of its pixels.
        image_size: of the model. Pixels of images of this size come along.
        short_side: images whose shorter side is larger are made smaller. None: images stay as they are.
        pixels: whether those of images of the model's size come along.
        reference: whether, in place of the image, the path and state of its file come along.
        shorter: the shorter side of images whose middle square is summed. None: nothing is.
    """

    channels: int
    image_size: int
    short_side: int | None
    pixels: bool
    reference: bool
    shorter: int | None


class Converted(NamedTuple):
    """One image, or the reason why it is none. The first values are those of a row of a table.

    Attributes:
        fault: the reason, None for an image.
        height: in pixels, as stored.
        width: in pixels, as stored.
        content: SHA-256 of shape and pixels, 32 bytes.
        hash: the perceptual one.
        file: its absolute path as the system has it, if it is kept by reference.
        size: of that file, in bytes.
        mtime_ns: when that file was last changed.
        sums: those of its square by `statistics.sums_of`, as bytes, if they are wanted.
        data: the encoded image.
        pixels: (S, S, C) uint8 as bytes, if they are wanted.
    """

    fault: str | None = None
    height: int = 0
    width: int = 0
    content: bytes = b""
    hash: int = 0
    file: bytes | None = None
    size: int = 0
    mtime_ns: int = 0
    sums: bytes = b""
    data: bytes = b""
    pixels: bytes = b""


def converted(reads: Iterable[Read], images: int, wanted: Wanted, workers: int | None = None) -> Generator[Converted]:
    """Read and convert images, in order.

    Args:
        reads: one `Read` per image. It is advanced as images are needed.
        images: how many these are, or more.
        wanted: what is made of each.
        workers: processes. None: one per core. With 1, or for few images, this process does the work.

    Raises:
        LgpError: a process died.
    """
    workers = workers or cores()
    pixels = wanted.image_size**2 * wanted.channels if wanted.pixels else 0
    if workers == 1 or images < FEW:
        yield from _in_chunks(reads, lambda chunk: functools.partial(convert, chunk, wanted), 1, pixels)
        return
    with pool(workers) as processes:
        begin = lambda chunk: processes.submit(convert, chunk, wanted).result  # noqa: E731
        yield from _in_chunks(reads, begin, 2 * workers, pixels)


def _in_chunks(
    reads: Iterable[Read], begin: Callable[[list[Read]], Callable[[], list[Converted]]], most_in_flight: int, more: int
) -> Iterator[Converted]:
    """Convert chunks. Those that have begun are bounded in number and bytes, so memory is, however large images are.

    One image that is larger than all bounds is converted alone.

    Args:
        reads: one per image.
        begin: begins to convert a chunk, and returns what waits for the result.
        most_in_flight: chunks that have begun.
        more: bytes that come along with each image.
    """
    in_flight: deque[tuple[int, Callable[[], list[Converted]]]] = deque()
    their_bytes = 0
    for chunk, size in _chunks(reads, min(CHUNK_BYTES, IN_FLIGHT_BYTES // most_in_flight), more):
        while in_flight and (len(in_flight) == most_in_flight or their_bytes + size > IN_FLIGHT_BYTES):
            of_first, first = in_flight.popleft()
            yield from first()
            their_bytes -= of_first
        in_flight.append((size, begin(chunk)))
        their_bytes += size
    for _, result in in_flight:
        yield from result()


def _chunks(reads: Iterable[Read], most_bytes: int, more: int) -> Iterator[tuple[list[Read], int]]:
    """Yield chunks of at most so many bytes, with their bytes. An image that has more is a chunk of its own."""
    chunk: list[Read] = []
    total = 0
    for read in reads:
        known = bytes_of(read)
        size = more + (UNKNOWN_BYTES if known is None else known)
        if chunk and (total + size > most_bytes or len(chunk) == MOST):
            yield chunk, total
            chunk, total = [], 0
        chunk.append(read)
        total += size
    if chunk:
        yield chunk, total


def convert(reads: Sequence[Read], wanted: Wanted) -> list[Converted]:
    """Read and convert some images. One that fails gets the reason."""
    images: list[Converted] = []
    group: list[_Decoded] = []
    pixels = 0
    for read in reads:
        group.append(_decoded(read, wanted))
        pixels += group[-1].pixels.nbytes
        if pixels > HASHED_BYTES:
            images += _described(group, wanted)
            group, pixels = [], 0
    images += _described(group, wanted)
    return images


class _Decoded(NamedTuple):
    """An image before its digests. In reference to a file, there is no `data`."""

    data: bytes = b""
    pixels: np.ndarray = np.empty((0, 0, 1), dtype=np.uint8)
    fault: str | None = None
    file: bytes | None = None
    size: int = 0
    mtime_ns: int = 0


def _decoded(read: Read, wanted: Wanted) -> _Decoded:
    try:
        if not wanted.reference:
            return _Decoded(*_as_stored(read(), wanted))
        file = path_of(read)
        state = file.stat()
        pixels = decode(read(), wanted.channels)
        return _Decoded(b"", pixels, None, os.fsencode(file.absolute()), state.st_size, state.st_mtime_ns)
    except Exception as error:  # noqa: BLE001 - readers and decoders of damaged files raise any exception
        return _Decoded(fault=plain(error))


def _described(images: list[_Decoded], wanted: Wanted) -> Iterator[Converted]:
    """Add digests and hashes. Yield images and faults in order."""
    hashes = iter(perceptual_hashes([image.pixels for image in images if image.fault is None]).tolist())
    for data, pixels, fault, file, size, mtime_ns in images:
        if fault is not None:
            yield Converted(fault)
            continue
        height, width, _ = pixels.shape
        along = pixels.tobytes() if wanted.pixels and height == width == wanted.image_size else b""
        content = content_of(pixels)
        sums = _sums_of_square(pixels, wanted)
        yield Converted(None, height, width, content, next(hashes), file, size, mtime_ns, sums, data, along)


def _sums_of_square(pixels: np.ndarray, wanted: Wanted) -> bytes:
    if wanted.shorter is None:
        return b""
    return sums_of(square(pixels, wanted.shorter, wanted.image_size, RESAMPLING["bilinear"])).tobytes()


def _as_stored(data: bytes | np.ndarray, wanted: Wanted) -> tuple[bytes, np.ndarray]:
    """Return an image encoded as it is stored, and its pixels."""
    pixels = decode(data, wanted.channels)
    if wanted.short_side is not None and min(pixels.shape[:2]) > wanted.short_side:
        data = _encode_photograph(shrink(pixels, wanted.short_side))
        return data, decode(data, wanted.channels)
    return (encode(pixels) if isinstance(data, np.ndarray) else data), pixels


def _encode_photograph(pixels: np.ndarray) -> bytes:
    """Encode as JPEG if it knows these channels, else without loss."""
    if pixels.shape[2] not in (1, 3):
        return encode(pixels)
    buffer = io.BytesIO()
    as_image(pixels).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


def content_of(pixels: np.ndarray) -> bytes:
    """Return the identity of an image: SHA-256 of the shape and the pixels (H, W, C), however they are encoded."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def path_of(read: Read) -> Path:
    """Return the file that a `Read` reads.

    Raises:
        LgpError: it reads no ordinary file.
    """
    if isinstance(read, functools.partial) and read.func is read_file:
        return Path(read.args[0])
    raise LgpError(
        "data.storage is reference, but images of this source are no files by themselves (they lie in an archive, a "
        "table or an array): set data.storage to copy"
    )
