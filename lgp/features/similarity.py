"""The nearest neighbours of an image among embeddings in a file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lgp.errors import LgpError, one_line
from lgp.params.evaluate import FeatureParams

ROWS = 2**14  # compared at once


@dataclass(frozen=True)
class Embeddings:
    """What `lgp embed` wrote: arm, digest of its encoder, what the features are made of, paths, and the features.

    These are (N, D).
    """

    arm: str
    encoder: str
    form: str
    paths: list[str]
    features: np.ndarray


def form_of(params: FeatureParams) -> str:
    """Say what features are made of. Those of different forms are not compared."""
    return f"{params.pool} of the last {params.blocks} blocks"


def read_embeddings(file: Path) -> Embeddings:
    """Read a file of embeddings. Raise `LgpError` if it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, page_checksum_verification=True)
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        features = table["features"].combine_chunks()
        values = features.flatten().to_numpy(zero_copy_only=False).reshape(len(features), -1)
        return Embeddings(about["arm"], about["encoder"], about["features"], table["path"].to_pylist(), values)
    except (OSError, pa.ArrowException, KeyError, ValueError) as e:
        reason = one_line(e)
        raise LgpError(f"{file} has no embeddings ({reason}): `lgp embed SOURCE --out {file}` writes them") from None


def nearest(known: Embeddings, features: np.ndarray, count: int) -> list[tuple[str, float]]:
    """Return the paths of the nearest images by the cosine of the features, the nearest first, with the cosine."""
    query = features / max(float(np.linalg.norm(features)), 1e-12)
    cosines = np.concatenate(
        [
            block @ query / np.maximum(np.linalg.norm(block, axis=1), 1e-12)
            for start in range(0, len(known.features), ROWS)
            for block in [known.features[start : start + ROWS].astype(np.float32)]
        ]
    )
    order = np.argsort(-cosines, kind="stable")[:count]
    return [(known.paths[i], float(cosines[i])) for i in order.tolist()]
