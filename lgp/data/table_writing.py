"""Tables that users read, written row by row: CSV or Parquet, by the name of the file."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from lgp.errors import LgpError

SUFFIXES = (".csv", ".parquet")


@contextmanager
def table_writer(file: Path, about: Mapping[str, str] | None = None) -> Iterator[Callable[[pd.DataFrame], None]]:
    """Yield what appends rows to a table. The file appears, or is replaced, as the block ends without an error.

    Args:
        file: its suffix says the format.
        about: metadata of a Parquet file.

    Raises:
        LgpError: the name says no format, the folder does not exist, or a Parquet file gets no row.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise LgpError(f"{file}: give a name that ends in {' or '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise LgpError(f"{file.parent} is no folder: make it first")
    partial = file.with_name(f".partial.{file.name}")
    try:
        with _csv(partial) if file.suffix.lower() == ".csv" else _parquet(partial, about or {}) as write:
            yield write
        if not partial.exists():
            raise LgpError(f"there is no row to write into {file}: no image can be read")
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _csv(file: Path) -> Iterator[Callable[[pd.DataFrame], None]]:
    with file.open("w", encoding="utf-8", newline="") as text:
        yield lambda table: table.to_csv(text, index=False, header=text.tell() == 0, lineterminator="\n")


@contextmanager
def _parquet(file: Path, about: Mapping[str, str]) -> Iterator[Callable[[pd.DataFrame], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None

    def write(table: pd.DataFrame) -> None:
        nonlocal writer
        schema = None if writer is None else writer.schema
        rows = pa.Table.from_pandas(table, schema=schema, preserve_index=False)
        rows = rows.replace_schema_metadata({**(rows.schema.metadata or {}), **about})
        writer = writer or pq.ParquetWriter(file, rows.schema, write_page_checksum=True)
        writer.write_table(rows)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
