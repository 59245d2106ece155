"""What stages leave for each other is read intact, or not at all: one line names the file, the fault and the remedy."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from lgp.errors import LgpError

if TYPE_CHECKING:
    import pyarrow as pa

OF_PYTHON = (ValueError, EOFError, LookupError, TypeError, OSError, RecursionError)
OWN_DIGEST = "checksum"  # the key of a record that has the digest of its other values


class Damaged(LgpError):  # noqa: N818 - it says what is the case
    """A file that is not as the stage that makes it wrote it."""

    def __init__(self, file: Path, fault: str, remedy: str) -> None:
        """Say that `file` has a fault, and how to make it anew: `remedy` is an instruction."""
        self.file, self.fault = file, " ".join(fault.split())
        super().__init__(f"{file} is damaged ({self.fault}): {remedy}, or `dvc repro`, to make it anew")


@contextmanager
def reading(file: Path, remedy: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise `Damaged` in place of the errors that a damaged file gives.

    Args:
        file: that is read.
        remedy: what makes it anew.
        errors: of the library that reads it, beside those of Python.
    """
    given: tuple[type[Exception], ...] = (*OF_PYTHON, *errors)
    try:
        yield
    except FileNotFoundError:
        raise Damaged(file, "it is missing", remedy) from None
    except given as e:
        raise Damaged(file, _first_line(e), remedy) from None


def _first_line(error: Exception) -> str:
    """Return what is wrong in a few words. Errors of pydantic list every fault."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return f"{type(error).__name__}: {error}"


def read_json(file: Path, kind: Any, remedy: str) -> Any:
    """Read a JSON file as plain values. Keys that its kind does not name are kept.

    Args:
        file: that is read.
        kind: a model of pydantic, or a type that pydantic checks.
        remedy: what makes the file anew.

    Raises:
        Damaged: it is missing, no JSON, or of another kind.
    """
    with reading(file, remedy):
        values = json.loads(file.read_text(encoding="utf-8"))
        TypeAdapter(kind).validate_python(values, strict=True)
        return values


def record_text(values: dict[str, Any]) -> str:
    """Return JSON with a digest of its values, for files that nobody edits and that have no seal."""
    return json.dumps(values | {OWN_DIGEST: _digest_of(values)}, indent=2) + "\n"


def read_record(file: Path, kind: Any, remedy: str) -> dict[str, Any]:
    """Read what `record_text` gave, without the digest. A file of an older version has none.

    Raises:
        Damaged: it is missing, no JSON, of another kind, or its values are not those that were written.
    """
    values: dict[str, Any] = read_json(file, kind, remedy)
    digest = values.pop(OWN_DIGEST, None)
    if digest is not None and digest != _digest_of(values):
        raise Damaged(file, "its values are not those that were written", remedy)
    return values


def _digest_of(values: dict[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_parquet(file: Path, columns: Sequence[str], remedy: str) -> "pa.Table":
    """Read columns of a Parquet file. Raise `Damaged` if it is none, or lacks one of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with reading(file, remedy, pa.ArrowException):
        # not by the schema that pandas left: a file without a column must not be read as an index
        return pq.read_table(file, columns=list(columns)).select(list(columns))
