"""Results that DVC restored from its cache, or that came with git: they get a run where the store has none."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgp.compute.digests import file_digest
from lgp.evaluate.results_files import read_metrics
from lgp.models.files import WEIGHTS, encoder_digest, read_provenance
from lgp.params.arms import how_to_evaluate
from lgp.workflow.mlflow_store import Evaluated
from lgp.workflow.origins import committed_values, encoder_values, flatten, run_name, values_behind
from lgp.workflow.tracking import Description, Tracker, tracked


@dataclass(frozen=True)
class KeptResult:
    """The files of an evaluation. Only the metric file need exist.

    Attributes:
        arm: of the encoder.
        task: linear, fewshot-1pct, …
        metrics: metric file.
        predictions: file of predictions.
        classifier: folder, whose provenance says how the result came about.
        encoder: folder.
    """

    arm: str
    task: str
    metrics: Path
    predictions: Path
    classifier: Path
    encoder: Path


def log_restored(results: Iterable[KeptResult], store: Tracker, params_file: Path) -> int:
    """Log a run of each result that the store has no run of. Nothing is computed.

    The run has the tags `restored` and `result_digest`, the digest of the metric file. The run that evaluated, in
    whatever store, has the same `result_digest`.

    Args:
        results: of all arms and tasks; those without a metric file do not count.
        store: any tracker of it.
        params_file: the project's parameter file.

    Returns:
        How many runs were logged; 0 where the store does not answer.
    """
    found = store.ask(lambda m: m.results("tags.result_digest LIKE '%'"))
    if found is None:
        return 0
    known = {(run.arm, run.tags["task"], run.tags["result_digest"]) for run in found}
    there = [(result, file_digest(result.metrics)) for result in results if result.metrics.exists()]
    missing = [(result, digest) for result, digest in there if (result.arm, result.task, digest) not in known]
    committed = committed_values(params_file) if missing else {}
    for result, digest in missing:
        _log(result, digest, committed, store)
    return len(missing)


def _log(result: KeptResult, digest: str, committed: dict[str, str], store: Tracker) -> None:
    metrics = read_metrics(result.metrics, how_to_evaluate(result.arm, result.task))
    record, encoder = _record_of(result, metrics), _encoder_of(result, metrics)
    behind = {} if encoder is None else values_behind(encoder)
    own, inputs = flatten(record.get("params", {})), record.get("digests", {}).get("inputs", {})
    tags = {
        "arm": result.arm,
        "task": result.task,
        "stage": result.task.partition("-")[0],
        "restored": "true",
        "git_commit": record.get("commit", ""),
        "params_digest": record.get("digests", {}).get("parameters", ""),
        "code_digest": record.get("digests", {}).get("code", ""),
        "data_digest": next((d for path, d in inputs.items() if path.endswith("prepared")), ""),
        "encoder_params": json.dumps(behind) if behind else "",
        "mlflow.note.content": f"Logged from {result.metrics.as_posix()}, which this store had no run of. The run that "
        f"evaluated has the same tag: tags.result_digest = '{digest}'.",
    }
    values = own | encoder_values(behind, metrics["encoder"]) | {"arm": result.arm, "task": result.task}
    name = f"{run_name(result.arm, result.task, own | behind, committed)} (restored)"
    tags = {key: value for key, value in tags.items() if value}
    about = Description(result.arm, result.task, tags, values, store.uri, store.experiment, name)
    noted = store.root / ".lgp" / f"restored-{digest}.run"
    with tracked(about, store.root, noted) as tracker:
        tracker.tag_upstream(metrics["encoder"])
        tracker.will_link(Evaluated(encoder, metrics["encoder"], inputs))
        tracker.log_metrics({key: float(v) for key, v in metrics.items() if isinstance(v, int | float)})
        tracker.log_result([path for path in (result.metrics, result.predictions) if path.exists()])
    noted.unlink(missing_ok=True)


def _record_of(result: KeptResult, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance of the result; nothing where its classifier is not there, or is of another evaluation."""
    record = read_provenance(result.classifier)
    return record if record.get("metrics") == metrics else {}


def _encoder_of(result: KeptResult, metrics: dict[str, Any]) -> Path | None:
    """Return the folder of the encoder, None where it is not there, or is another one by now."""
    there = (result.encoder / WEIGHTS).exists() and encoder_digest(result.encoder) == metrics["encoder"]
    return result.encoder if there else None
