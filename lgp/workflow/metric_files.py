"""Metric files: the same bytes for the same metrics, so that an equal result stops a re-run from spreading."""

from pathlib import Path
from typing import Any

from lgp.compute.intact import record_text
from lgp.workflow.stage import StageRun


def write_metrics(run: StageRun, written: Path, metrics: dict[str, Any]) -> None:
    """Write a metric file, and track its numbers.

    Args:
        run: the stage.
        written: the file, at or below an `out` path of the stage.
        metrics: flat, by name; texts and lists are written and not tracked. True is tracked as 1, false as 0.
    """
    written.write_text(record_text(metrics), encoding="utf-8")
    # the loss is tracked epoch by epoch already
    numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and k != "train/loss"}
    run.tracker.log_metrics(numbers)
