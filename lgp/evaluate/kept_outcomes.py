"""Outcomes kept for other names of the same labelled images: such a name reads the outcome and computes nothing.

Of few images two shares may be the same, e.g. 1 % and 10 % of 145 labels in ten classes. A kept outcome is a table and
a classifier in `.lgp/outcomes`, for each arm, task and group of names. Both have the digest of what decided them, and
are replaced at once, so that evaluations which run at the same time read a whole one or none; then both compute. So do
evaluations that find a damaged one.
"""

import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lgp.compute.digests import file_digest
from lgp.evaluate.outcome import Outcome
from lgp.evaluate.results_files import predictions_digest
from lgp.models.classifier_folder import read_classifier, write_classifier

KEPT = Path(".lgp") / "outcomes"
FORMAT = 3  # version of the file: raise it when it changes
COMPUTED_WITH = (
    "torch",
    "torchvision",
    "timm",
    "pillow",
    "scikit-learn",
    "numpy",
    "scipy",
)  # their versions change the last digits
META = b"lgp"


class KeptOutcome:
    """The outcome of an evaluation in a file, with a digest of what decided it."""

    def __init__(self, file: Path, decided_by: Any) -> None:
        """Use `file`. `decided_by` are plain values: everything that decides the outcome, and no name of labels."""
        self.file = file
        versions = [FORMAT, *map(version, COMPUTED_WITH)]
        self.digest = sha256(json.dumps([versions, decided_by], sort_keys=True).encode()).hexdigest()

    def of_another_name(self, name: str) -> tuple[str, Outcome] | None:
        """Return the name that computed the outcome, and it. None if that is `name`, or if other things decided it."""
        try:
            table = pq.read_table(self.file)
        except (OSError, pa.ArrowException):
            return None
        try:
            meta, predictions = json.loads(table.schema.metadata[META]), table.to_pandas()
            if meta["digest"] != self.digest or meta["name"] == name:
                return None
            classifier_file = self.file.with_suffix(".safetensors")
            classifier = read_classifier(classifier_file, self.digest)
            if classifier is None or meta.pop("checksum") != _checksum(meta, predictions, classifier_file):
                return None
        except (ValueError, LookupError, TypeError):
            return None
        return meta["name"], Outcome(meta["metrics"], predictions, classifier)

    def keep(self, name: str, outcome: Outcome) -> None:
        """Write the outcome that was computed for `name`."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_name(f".partial.{name}-{self.file.name}")
        assert outcome.classifier is not None
        of_classifier = partial.with_suffix(".safetensors")
        write_classifier(of_classifier, outcome.classifier, self.digest)
        table = pa.Table.from_pandas(outcome.predictions)
        meta = {"digest": self.digest, "name": name, "metrics": outcome.metrics}
        meta["checksum"] = _checksum(meta, outcome.predictions, of_classifier)
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, META: json.dumps(meta)}), partial)
        of_classifier.replace(self.file.with_suffix(".safetensors"))
        partial.replace(self.file)


def _checksum(meta: dict[str, Any], predictions: pd.DataFrame, classifier: Path) -> str:
    """Return the digest of a whole kept outcome."""
    content = [meta, predictions_digest(predictions), file_digest(classifier)]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
