"""Writing images as prepared data: encoded bytes in Arrow shards, or one array of pixels if all have one size."""

import hashlib
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image

from lgp.data.leaks import perceptual_hash
from lgp.data.sources import Described, Record
from lgp.data.storage import ARRAY, decode, shards_in
from lgp.errors import LgpError, check_disk_space
from lgp.params.data import DataParams

SHARD_BYTES = 512 * 2**20
ARRAY_BYTES = 4 * 2**30  # above this, images stay encoded even if all have the model's size
CHUNK = 1024  # records that are decoded at once


@dataclass(frozen=True)
class Stored:
    """The result of `store_encoded`.

    Attributes:
        table: a row per stored image: split and label of the source, path, height, width, content (SHA-256
            of the file) and hash (perceptual, uint64).
        unreadable: path and reason of each image that was left out.
    """

    table: pd.DataFrame
    unreadable: list[dict[str, str]]


@dataclass(frozen=True)
class _Decoded:
    """A decoded record: its bytes, size and perceptual hash, or the reason of a failure."""

    about: Described
    data: bytes = b""
    height: int = 0
    width: int = 0
    hash: int = 0
    fault: str = ""


def store_encoded(records: Iterator[Record], chosen: set[int] | None, channels: int, folder: Path) -> Stored:
    """Write the encoded bytes of all readable records to Arrow shards, in order. Decoding is threaded.

    Args:
        records: of the source.
        chosen: positions of the records to store, None for all.
        channels: 1 or 3.
        folder: where to write.

    Raises:
        LgpError: the source holds no image at all.
    """
    rows: list[dict[str, object]] = []
    unreadable: list[dict[str, str]] = []

    def readable() -> Iterator[bytes]:
        wanted = (r for i, r in enumerate(records) if chosen is None or i in chosen)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            while chunk := list(itertools.islice(wanted, CHUNK)):
                for decoded in pool.map(lambda r: _decoded(r, channels), chunk):
                    if decoded.fault:
                        unreadable.append({"path": decoded.about.path, "reason": decoded.fault})
                        continue
                    content = hashlib.sha256(decoded.data).digest()
                    size = {"height": decoded.height, "width": decoded.width}
                    rows.append({**decoded.about._asdict(), **size, "content": content, "hash": decoded.hash})
                    yield decoded.data

    _write_shards(readable(), folder)
    if not rows and not unreadable:
        raise LgpError("the data source holds no image at all")
    return Stored(pd.DataFrame(rows), unreadable)


def _decoded(record: Record, channels: int) -> _Decoded:
    about = record.about
    if about.split != "unlabeled" and about.label < 0:
        return _Decoded(about, fault="without a label: not inside a class folder, or none in its row")
    try:
        data = record.read()
        if isinstance(data, np.ndarray):
            data = _png(data)
        if not data:
            return _Decoded(about, fault="empty")
        image = decode(data, channels)
        return _Decoded(about, data, image.height, image.width, perceptual_hash(image))
    except Exception as e:  # noqa: BLE001 - decoders of damaged files raise any exception
        # PIL's message may name an object's address in memory, which differs from run to run
        reason = "not an image that can be decoded" if "cannot identify" in str(e) else str(e) or type(e).__name__
        return _Decoded(about, fault=reason)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "png")
    return buffer.getvalue()


def _write_shards(images: Iterable[bytes], folder: Path) -> None:
    schema = pa.schema([("image", pa.large_binary())])
    pending = iter(images)
    for number in itertools.count():
        first = next(pending, None)
        if first is None:
            return
        with pa.ipc.new_file(str(folder / f"images-{number:05d}.arrow"), schema) as writer:
            written = 0
            for data in itertools.chain([first], pending):
                writer.write_batch(pa.record_batch([pa.array([data], pa.large_binary())], schema=schema))
                written += len(data)
                if written >= SHARD_BYTES:
                    break


def have_one_size(table: pd.DataFrame, params: DataParams) -> bool:
    """Return whether all images have the model's size and fit into one array."""
    size = params.image_size
    fits = len(table) * size * size * params.channels <= ARRAY_BYTES
    return fits and bool((table["height"] == size).all() and (table["width"] == size).all())


def decode_to_array(folder: Path, images: int, params: DataParams) -> None:
    """Replace the shards by one array of pixels, (images, S, S, C) uint8."""
    encoded = shards_in(folder)
    shape = (images, params.image_size, params.image_size, params.channels)
    # on a full disk, writing through a memory map raises nothing: the system kills the process
    check_disk_space(folder, math.prod(shape))
    pixels = np.lib.format.open_memmap(folder / ARRAY, mode="w+", dtype=np.uint8, shape=shape)
    row = 0
    for path in encoded:
        for data in pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"]:
            pixels[row] = np.asarray(decode(data.as_py(), params.channels)).reshape(shape[1:])
            row += 1
    pixels.flush()
    for path in encoded:
        path.unlink()
