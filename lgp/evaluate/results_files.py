"""The files of an evaluation that the report reads: metrics and predictions. Each has a digest of its own content."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, Field

from lgp.compute.intact import Damaged, read_parquet, read_record, reading

COLUMNS = {"id": "int64", "label": "int64", "prediction": "int64", "confidence": "float32", "subset": "int64"}
DIGEST = b"lgp.digest"  # key in the metadata of the Parquet file


class OutcomeMetrics(BaseModel):
    """What the metrics of an evaluation have at least."""

    top1_on_test: float = Field(alias="test/top1")


def read_metrics(file: Path, remedy: str) -> dict[str, Any]:
    """Read the metrics of an evaluation. Raise `Damaged` if the file is; `remedy` makes it anew."""
    return read_record(file, OutcomeMetrics, remedy)


def predictions_digest(predictions: pd.DataFrame) -> str:
    """Return a digest of a row per image and subset, in order."""
    rows = pd.util.hash_pandas_object(predictions[list(COLUMNS)], index=False)
    return sha256(rows.to_numpy().tobytes()).hexdigest()


def write_predictions(file: Path, predictions: pd.DataFrame) -> None:
    """Write predictions as Parquet, with the digest of their rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(predictions, preserve_index=False)
    about = {**(table.schema.metadata or {}), DIGEST: predictions_digest(predictions)}
    pq.write_table(table.replace_schema_metadata(about), file)


def read_predictions(file: Path, remedy: str) -> pd.DataFrame:
    """Read what `write_predictions` wrote. A file of an older version has no digest.

    Raises:
        Damaged: it is missing or no Parquet file, lacks a column, or its rows are not those that were written.
    """
    table = read_parquet(file, list(COLUMNS), remedy)
    with reading(file, remedy):
        # without what pandas left in the metadata, which has no digest
        predictions: pd.DataFrame = table.replace_schema_metadata(None).to_pandas().astype(COLUMNS)
    digest = (table.schema.metadata or {}).get(DIGEST)
    if digest is not None and digest != predictions_digest(predictions).encode():
        raise Damaged(file, "its rows are not those that were written", remedy)
    return predictions
