"""An evaluation as a stage: features of an arm's encoder in, metrics, predictions and a picture out."""

from pathlib import Path

from lgp.checkpoint import check_input_size, load_encoder
from lgp.data.prepared import Prepared
from lgp.device import choose_device
from lgp.evaluate.features import Features, class_token_of
from lgp.evaluate.outcome import Outcome
from lgp.params import RunParams
from lgp.stage import StageRun, encoder_digest


def encoder_features(folder: Path, data: Prepared, settings: RunParams) -> Features:
    """Extract the features of the encoder in `folder` for train, val and test."""
    check_input_size(folder, data)
    return Features.of(class_token_of(load_encoder(folder), choose_device(settings)), data)


def publish_outcome(
    run: StageRun, encoder: Path, metrics: Path, predictions: Path, outcome: Outcome, data: Prepared
) -> None:
    """Write the metric file and the predictions, and track both, with the confusion matrix as a picture.

    The metrics name the encoder by its digest, so that they differ wherever it does.
    """
    outcome.predictions.to_parquet(run.out(predictions), index=False)
    run.write_metrics(run.out(metrics), {**outcome.metrics, "encoder": encoder_digest(encoder)})
    print(f"{run.spec.arm} / {run.spec.task}: {outcome.metrics['test/top1']:.1f} % top-1 on test", flush=True)
    run.tracker.log_confusion(outcome.predictions, data.classes)
