"""A tracking store in a project that was moved or copied: its addresses follow.

MLflow keeps absolute addresses of artifacts in its database. After a move no registered model would load. A copy would
write the files of its runs into the original's folder.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

ARTIFACTS = "mlartifacts"
# table → its column of addresses
ADDRESSES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def follow(file: Path, root: Path) -> list[str]:
    """Turn addresses below the artifacts of another folder into those of `root`, and return the folders' addresses.

    A database outside of `root` is not the project's own. It may serve several projects, and stays.

    Args:
        file: database of MLflow. It may be new and empty.
        root: folder of the project. Its artifacts are in `mlartifacts`.
    """
    if file.resolve().parent != root.resolve():
        return []
    here = (root / ARTIFACTS).resolve().as_uri()
    with closing(sqlite3.connect(file)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables.issuperset(ADDRESSES):
            return []
        locations = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        ours = [address for (address,) in locations if address.startswith("file://") and _is_ours(address)]
        elsewhere = [address for address in ours if address != here]
        with database:
            for address in elsewhere:
                _replace(database, address, here)
    return elsewhere


def _is_ours(address: str) -> bool:
    return address.endswith(f"/{ARTIFACTS}")


def _replace(database: sqlite3.Connection, there: str, here: str) -> None:
    """Replace the beginning of each address that is `there` or below it."""
    below = f"{there}/"
    for table, column in ADDRESSES.items():
        database.execute(
            f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
            [here, len(there) + 1, there, len(below), below],
        )
