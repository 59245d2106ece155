"""Table files: Parquet, and Arrow in its file and its stream format. Columns are read without the images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lgp.errors import LgpError, one_line

BATCH = 64  # rows of Parquet that are in memory at once
BUFFER_BYTES = 2**20  # without a buffer, or with pre_buffer, a whole column of a row group is in memory


class TableFile(Protocol):
    """A table in a file. It keeps no file open."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def schema(self) -> Any:
        """The `pyarrow.Schema`."""

    @property
    def rows(self) -> int:
        """The number of rows."""

    def columns(self, names: Sequence[str]) -> Any:
        """Read a few small columns, as a `pyarrow.Table`. Raise `LgpError` if they are damaged."""

    def lacks(self, name: str, leaf: str) -> bool:
        """Return whether a field of a struct column is null in every row, as far as that is known without reading."""

    def values(self, name: str, rows: np.ndarray) -> Iterator[object]:
        """Stream one column of these rows, which ascend. A value that cannot be read comes as the error."""


def open_table(path: Path) -> TableFile:
    """Open a table by the first bytes of its file.

    Raises:
        LgpError: the file cannot be read as a table.
    """
    with _told(path):
        with path.open("rb") as file:
            magic = file.read(6)
        is_parquet = path.suffix == ".parquet"
        table: TableFile = ParquetTable(path) if is_parquet else ArrowTable(path, is_file=magic == b"ARROW1")
        _ = table.schema.names, table.rows
        return table


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Raise `LgpError` with the name of a file that cannot be read as a table in the block."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, EOFError, UnicodeError) as e:
        kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
        raise LgpError(f"{path} cannot be read as {kind}: {one_line(e)}; mend or remove it") from None


def _valid(table: Any) -> Any:
    """Return a table whose cells are what their columns say: text is UTF-8, lengths are within their column."""
    table.validate(full=True)
    return table


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file."""

    path: Path

    @cached_property
    def _metadata(self) -> Any:
        import pyarrow.parquet as pq

        return pq.read_metadata(self.path)

    @cached_property
    def schema(self) -> Any:
        """The `pyarrow.Schema`."""
        import pyarrow.parquet as pq

        return pq.read_schema(self.path)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(self._metadata.row_group(group).num_rows for group in range(self._metadata.num_row_groups))

    def columns(self, names: Sequence[str]) -> Any:
        """Read a few small columns, as a `pyarrow.Table`. `image.path` reads a field of a struct column alone."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _told(self.path), pq.ParquetFile(self.path) as file:
            table = _valid(file.read(columns=list(names)))
            if table.num_rows != self.rows:
                raise pa.ArrowInvalid(f"its columns have {table.num_rows} values for {self.rows} rows")
            return table

    def lacks(self, name: str, leaf: str) -> bool:
        """Return whether the statistics say that a field of a struct column is null in every row."""
        groups = (self._metadata.row_group(i) for i in range(self._metadata.num_row_groups))
        return self.rows > 0 and all(_all_null(group, f"{name}.{leaf}") for group in groups)

    def values(self, name: str, rows: np.ndarray) -> Iterator[object]:
        """Stream one column of these rows, which ascend. A damaged row group yields errors, and the next is read."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=BUFFER_BYTES) as file:
            start = 0
            for group in range(self._metadata.num_row_groups):
                end = start + self._metadata.row_group(group).num_rows
                wanted = rows[(rows >= start) & (rows < end)] - start
                yield from _each(_of_group(file, group, name, wanted), len(wanted))
                start = end


def _each(values: Iterator[object], number: int) -> Iterator[object]:
    """Stream this number of values. Those that a damaged part does not give come as its error."""
    import pyarrow as pa

    fault: Exception = pa.ArrowInvalid("it has fewer values than rows")
    done = 0
    try:
        for value in values:
            yield value
            done += 1
    except (pa.ArrowException, OSError, UnicodeError) as e:
        fault = e
    yield from [fault] * (number - done)


def _of_group(file: Any, group: int, name: str, wanted: np.ndarray) -> Iterator[object]:
    start = 0
    if len(wanted) == 0:
        return
    for batch in file.iter_batches(BATCH, row_groups=[group], columns=[name]):
        column = batch.column(0)
        for row in wanted[(wanted >= start) & (wanted < start + len(column))]:
            yield column[int(row) - start].as_py()
        start += len(column)
        if start > wanted[-1]:
            return


def _all_null(group: Any, path: str) -> bool:
    columns = [group.column(i) for i in range(group.num_columns)]
    found = [column.statistics for column in columns if column.path_in_schema == path]
    return all(s is not None and s.has_null_count and s.null_count == group.num_rows for s in found)


@dataclass(frozen=True)
class ArrowTable:
    """An Arrow file. It is mapped into memory: only what is used is read.

    Attributes:
        path: the file.
        is_file: whether it has the file format; else it has the stream format, as `datasets` writes it.
    """

    path: Path
    is_file: bool

    @cached_property
    def schema(self) -> Any:
        """The `pyarrow.Schema`."""
        with self._opened(None) as reader:
            return reader.schema

    @cached_property
    def rows(self) -> int:
        """The number of rows."""
        return sum(batch.num_rows for batch in self._batches([]))

    def columns(self, names: Sequence[str]) -> Any:
        """Read a few small columns, as a `pyarrow.Table`. `image.path` reads a field of a struct column alone."""
        import pyarrow as pa

        with _told(self.path):
            table = _valid(pa.Table.from_batches(list(self._batches([name.partition(".")[0] for name in names]))))
        return table.flatten().select(list(names)) if any("." in name for name in names) else table

    def lacks(self, name: str, leaf: str) -> bool:
        """Return whether a field of a struct column is null in every row."""
        return self.rows > 0 and all(
            batch.column(0).field(leaf).null_count == batch.num_rows for batch in self._batches([name])
        )

    def values(self, name: str, rows: np.ndarray) -> Iterator[object]:
        """Stream one column of these rows, which ascend. After a damaged batch, every value is the error."""
        yield from _each(self._of_batches(name, rows), len(rows))

    def _of_batches(self, name: str, rows: np.ndarray) -> Iterator[object]:
        start = 0
        for batch in self._batches([name]):
            column = batch.column(0)
            for row in rows[(rows >= start) & (rows < start + len(column))]:
                yield column[int(row) - start].as_py()
            start += len(column)

    @property
    def _small(self) -> int:
        """The position of a column that holds no images, if there is one."""
        import pyarrow as pa

        types = self.schema.types
        return next((i for i, kind in enumerate(types) if pa.types.is_primitive(kind)), 0)

    def _batches(self, names: Sequence[str]) -> Iterator[Any]:
        with self._opened(names) as reader:
            if self.is_file:
                yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                yield from reader

    def _opened(self, names: Sequence[str] | None) -> Any:
        import pyarrow as pa

        # no column at all would mean all of them
        fields = None if names is None else [self.schema.get_field_index(name) for name in names] or [self._small]
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        file = pa.memory_map(str(self.path))
        return pa.ipc.open_file(file, options=options) if self.is_file else pa.ipc.open_stream(file, options=options)
