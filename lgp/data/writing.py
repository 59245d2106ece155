"""Storing images as prepared data: an array of pixels if all have the model's size, else Arrow shards of encoded bytes.

Images are written in pieces, into a folder for work in progress. A run that was killed continues after its last whole
piece, and ends with the same bytes.

| file of a piece | content |
|---|---|
| `N.arrow` | the encoded images |
| `N.pixels` | their pixels, while all images so far have the model's size |
| `N.parquet` | a row per image or fault; it is written last and makes the piece whole |

With `data.storage: reference` there are only rows, which name the files.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import PIL
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lgp.data.progress import progress
from lgp.data.reading import Converted, Wanted, converted, path_of
from lgp.data.sources.offers import Offers, Read, Skipped
from lgp.data.statistics import takes_all
from lgp.data.stored import ARRAY, BATCH_ROWS, SHARDS, encoded_batch
from lgp.errors import LgpError, check_disk_space
from lgp.params.data import DataParams

ARRAY_BYTES = 4 * 2**30  # above this, images stay encoded even if all have the model's size
PIECE_BYTES, PIECE_IMAGES = 256 * 2**20, 16_384
BATCH_BYTES = 16 * 2**20  # a record batch ends earlier where images are large
PLAN = "plan"
OF_FILE = [("file", pa.binary()), ("size", pa.int64()), ("mtime_ns", pa.int64())]
ROWS = pa.schema(
    [
        ("position", pa.int64()),
        ("fault", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("content", pa.binary()),
        ("hash", pa.uint64()),
        *OF_FILE,
        ("sums", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Stored:
    """The result of `store`.

    Attributes:
        table: a row per stored image, in the order of the store: position (in the source), height, width, content
            (SHA-256 of shape and pixels, bytes), hash (perceptual, uint64) and sums (of `Converted`, empty for many
            images or given statistics). By reference also file, size and mtime_ns.
        unreadable: the images that were left out.
    """

    table: pd.DataFrame
    unreadable: list[Skipped]


def store(
    offers: Offers, positions: Sequence[int], params: DataParams, work: Path, out: Path, workers: int | None = None
) -> Stored:
    """Read, decode and store images of a source. Each is read once.

    Args:
        offers: the source.
        positions: of the images to store, ascending. They are stored in this order.
        params: the section `data`.
        work: an existing folder for work in progress. It may hold that of a killed run, which goes on if it was to
            store the same. Afterwards nobody needs it.
        out: an existing folder for the stored images.
        workers: processes. None: one per core.

    Raises:
        LgpError: the settings contradict each other or do not fit the source, or the disk is full.
    """
    reference = params.storage == "reference"
    if reference and params.store_short_side is not None:
        raise LgpError(
            "data.store_short_side makes images smaller, data.storage reference keeps none: set data.storage to copy, "
            "or data.store_short_side to null"
        )
    positions = [int(position) for position in positions]
    form = (params.image_size, params.image_size, params.channels)
    fit = not reference and len(positions) * math.prod(form) <= ARRAY_BYTES
    summed = (params.mean is None or params.std is None) and takes_all(len(positions))
    shorter = int(params.image_size / params.eval_crop) if summed else None  # as `StoredImages.squares` rounds it
    wanted = Wanted(params.channels, params.image_size, params.store_short_side, fit, reference, shorter)
    pieces = _Pieces(work, reference, fit, math.prod(form))
    done = pieces.resume(_plan(offers, positions, wanted))
    rest = positions[done:]
    reads = offers.reads(rest)
    images = converted(_only_files(reads) if reference else reads, len(rest), wanted, workers)
    with closing(images), closing(pieces), progress(len(positions), done) as advance:
        for position, image in zip(rest, images, strict=True):
            pieces.add(position, image)
            advance(1)
        pieces.end()
    rows = pieces.rows()
    if not reference:
        pieces.gather(out, form)
    return _stored(rows, offers.paths, reference)


def _stored(rows: pa.Table, paths: Sequence[str], reference: bool) -> Stored:
    faulty = pc.is_valid(rows["fault"])
    faults = rows.filter(faulty).select(["position", "fault"]).to_pylist()
    left_out = ["fault"] if reference else ["fault", *(name for name, _ in OF_FILE)]
    table = rows.filter(pc.invert(faulty)).drop_columns(left_out).to_pandas()
    return Stored(table, [Skipped(paths[fault["position"]], fault["fault"]) for fault in faults])


def _only_files(reads: Iterator[Read]) -> Iterator[Read]:
    """Raise `LgpError` at a `Read` of anything but an ordinary file."""
    for read in reads:
        path_of(read)
        yield read


def _plan(offers: Offers, positions: Sequence[int], wanted: Wanted) -> str:
    """Return a digest of what is to be stored. Pieces of another plan are of no use."""
    limits = (ARRAY_BYTES, PIECE_BYTES, PIECE_IMAGES, PIL.__version__)
    plan = hashlib.sha256(f"{wanted} {limits}".encode())
    for position in positions:
        plan.update(f"{position}\0{offers.paths[position]}\0{offers.states[position]}\n".encode(errors="replace"))
    return plan.hexdigest()


@dataclass
class _Pieces:
    """The pieces of one store: those that are whole, and the one in progress.

    Attributes:
        work: their folder.
        reference: whether they have rows only.
        uniform: whether all images so far have the model's size, and all of them may become one array.
        image_bytes: of the pixels of an image of the model's size.
        whole: the number of whole pieces.
    """

    work: Path
    reference: bool
    uniform: bool
    image_bytes: int
    whole: int = 0
    _rows: list[tuple[Any, ...]] = field(default_factory=list)
    _batch: list[bytes] = field(default_factory=list)
    _batch_bytes: int = 0
    _encoded_bytes: int = 0
    _encoded: Any = None
    _pixels: BinaryIO | None = None

    def resume(self, plan: str) -> int:
        """Take over the whole pieces of the same plan. Remove all others. Return the number of their rows."""
        file = self.work / PLAN
        if not file.exists() or file.read_text(encoding="utf-8") != plan:
            for old in [file, *self.work.glob("[0-9]*.*")]:
                old.unlink(missing_ok=True)
            file.write_text(plan, encoding="utf-8")
        done = 0
        while (rows := self._file(self.whole, "parquet")).exists():
            done += pq.read_metadata(rows).num_rows
            images = pq.read_table(rows, columns=["fault"])["fault"].null_count
            self._still_uniform(self.uniform and self._pixel_bytes(self.whole) == images * self.image_bytes)
            self.whole += 1
        for unfinished in self.work.glob(f"{self.whole:05d}.*"):
            unfinished.unlink()
        return done

    def _pixel_bytes(self, piece: int) -> int:
        file = self._file(piece, "pixels")
        return file.stat().st_size if file.exists() else 0

    def _file(self, piece: int, suffix: str) -> Path:
        return self.work / f"{piece:05d}.{suffix}"

    def add(self, position: int, image: Converted) -> None:
        """Add the next image or fault."""
        self._rows.append((position, *image[: len(ROWS) - 1]))
        if image.fault is None and not self.reference:
            self._add_pixels(image.pixels)
            self._batch.append(image.data)
            self._batch_bytes += len(image.data)
            self._encoded_bytes += len(image.data)
            if len(self._batch) == BATCH_ROWS or self._batch_bytes >= BATCH_BYTES:
                self._write_batch()
        if self._encoded_bytes >= PIECE_BYTES or len(self._rows) >= PIECE_IMAGES:
            self.end()

    def _add_pixels(self, pixels: bytes) -> None:
        self._still_uniform(self.uniform and bool(pixels))
        if self.uniform:
            self._pixels = self._pixels or self._file(self.whole, "pixels").open("wb", 2**20)
            self._pixels.write(pixels)

    def _still_uniform(self, uniform: bool) -> None:
        if self.uniform and not uniform:
            self._close_pixels()
            for file in self.work.glob("[0-9]*.pixels"):
                file.unlink()
        self.uniform = uniform

    def _close_pixels(self) -> None:
        if self._pixels is not None:
            self._pixels.close()
        self._pixels = None

    def _write_batch(self) -> None:
        batch = encoded_batch(self._batch)
        if self._encoded is None:
            self._encoded = pa.ipc.new_file(str(self._file(self.whole, "arrow")), batch.schema)
        self._encoded.write_batch(batch)
        self._batch, self._batch_bytes = [], 0

    def end(self) -> None:
        """End the piece in progress, if it has a row. Its rows are written last, at once."""
        if not self._rows:
            return
        if self._batch:
            self._write_batch()
        self.close()
        columns = zip(*self._rows, strict=True)
        rows = pa.table([pa.array(c, of.type) for c, of in zip(columns, ROWS, strict=True)], schema=ROWS)
        partial = self._file(self.whole, "parquet.partial")
        pq.write_table(rows, partial)
        os.replace(partial, self._file(self.whole, "parquet"))
        self._rows, self._encoded_bytes = [], 0
        self.whole += 1

    def close(self) -> None:
        """Close the files of the piece in progress."""
        if self._encoded is not None:
            self._encoded.close()
        self._encoded = None
        self._close_pixels()

    def rows(self) -> pa.Table:
        """Return the rows of all whole pieces."""
        pieces = [pq.read_table(self._file(piece, "parquet")) for piece in range(self.whole)]
        return pa.concat_tables(pieces) if pieces else ROWS.empty_table()

    def gather(self, out: Path, form: tuple[int, int, int]) -> None:
        """Bring the images of all whole pieces to `out`: as one array, (N, *form), or as shards."""
        if self.uniform:
            self._gather_pixels(out / ARRAY, form)
            return
        files = (self._file(piece, "arrow") for piece in range(self.whole))
        for number, file in enumerate(file for file in files if file.exists()):
            _link(file, out / SHARDS.format(number))

    def _gather_pixels(self, array: Path, form: tuple[int, int, int]) -> None:
        files = [self._file(piece, "pixels") for piece in range(self.whole) if self._pixel_bytes(piece)]
        images = sum(file.stat().st_size for file in files) // self.image_bytes
        if not images:
            return
        check_disk_space(array.parent, images * self.image_bytes)
        with array.open("wb") as whole:
            header = {"descr": "|u1", "fortran_order": False, "shape": (images, *form)}
            np.lib.format.write_array_header_1_0(whole, header)
            for file in files:
                with file.open("rb") as piece:
                    shutil.copyfileobj(piece, whole, 2**20)


def _link(file: Path, target: Path) -> None:
    """Give a finished file a second name. Copy it where the file system knows no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
