"""Small images and tables that tests of data sources make."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lgp.data.sources.offers import Offers

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int = 0, size: int = 8) -> bytes:
    """Encode an image whose pixels depend on its number."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), number % 256, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def image_rows(count: int, start: int = 0) -> pa.Array:
    """Make images as `datasets` stores them, numbered from `start`."""
    return pa.array([{"bytes": png(start + i), "path": f"{i}.png"} for i in range(count)], IMAGE)


def class_names(names: list[str]) -> str:
    """Return the schema's metadata that names the classes of the column `label`."""
    return json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})


def image_table(labels: Any, metadata: str | None = None, start: int = 0, **columns: Any) -> pa.Table:
    """Make a table of images with labels and other columns."""
    table = pa.table({"image": image_rows(len(labels), start), "label": labels, **columns})
    return table.replace_schema_metadata({"huggingface": metadata}) if metadata else table


def parquet(path: Path, table: pa.Table, **options: Any) -> Path:
    """Write a table as Parquet, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def arrow(path: Path, table: pa.Table, new: Any = pa.ipc.new_stream, rows: int = 3) -> Path:
    """Write a table as Arrow, in the stream format as `datasets` does, in batches of a few rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def number_in(data: bytes | np.ndarray) -> int:
    """Return the number of an image of `png`."""
    assert isinstance(data, bytes)
    with Image.open(io.BytesIO(data)) as image:
        pixel = image.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return int(pixel[0])


def numbers(offers: Offers) -> list[int]:
    """Return the numbers of all images of a source, in its order."""
    return [number_in(read()) for read in offers.reads(range(len(offers)))]


def reason_of(offers: Offers, position: int) -> str:
    """Return why an image cannot be read."""
    (read,) = offers.reads([position])
    try:
        read()
    except Exception as e:  # noqa: BLE001 - a `Read` may raise any error
        return f"{type(e).__name__}: {e}"
    raise AssertionError("the image can be read")


def tar_archive(path: Path, files: dict[str, bytes], mode: Any = "w") -> Path:
    """Write a tar archive of files by name."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def zip_archive(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """Write a zip archive of files by name."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path
