"""Addresses of pages of MLflow's interface that show what was asked for without a click."""

import json
from collections.abc import Sequence
from urllib.parse import quote, urlencode

HEADLINE = "metrics.`test/top1`"
MODE = "machine_learning"  # the interface opens for language models otherwise


def runs_address(base: str, experiment_id: str, task: str) -> str:
    """Return the page of a task's runs, the best first."""
    asked = {"searchFilter": f"tags.task = '{task}'", "orderByKey": HEADLINE, "orderByAsc": "false"}
    return f"{base}/#/experiments/{experiment_id}/runs?{_query({'workflowType': MODE, **asked})}"


def models_address(base: str, experiment_id: str) -> str:
    """Return the page of the logged encoders, with a chart of each metric and task."""
    return f"{base}/#/experiments/{experiment_id}/models?{_query({'workflowType': MODE, 'viewMode': 'CHART'})}"


def compare_address(base: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return the page that compares runs. MLflow reads `runs` only where it stands first."""
    asked = {"runs": json.dumps(list(run_ids)), "experiments": json.dumps([experiment_id])}
    return f"{base}/#/compare-runs?{_query({**asked, 'workflowType': MODE})}"


def _query(values: dict[str, str]) -> str:
    return urlencode(values, quote_via=quote)
