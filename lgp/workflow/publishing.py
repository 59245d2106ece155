"""Publishing: a stage writes a trained, imported or untrained arm, or the outcome of an evaluation."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgp.compute.seals import seal
from lgp.errors import NotTrained
from lgp.evaluate.results_files import write_predictions
from lgp.models.classifier_folder import save_classifier
from lgp.models.encoder_folder import save_encoder, save_pixels
from lgp.models.files import ARM_METRICS, CURVES, ENCODER, LAST, encoder_digest, read_provenance, seal_arm
from lgp.models.heads_file import save_heads
from lgp.workflow.metric_files import write_metrics
from lgp.workflow.stage import StageRun

if TYPE_CHECKING:  # an evaluation does not import what pre-trains
    from timm.models.vision_transformer import VisionTransformer

    from lgp.data.normalization import Normalization
    from lgp.data.storage import Images
    from lgp.evaluate.outcome import Outcome
    from lgp.models.interchange import Imported
    from lgp.pretrain.arm import Pretrained


@dataclass(frozen=True)
class Places:
    """The outputs of an evaluation."""

    metrics: Path
    predictions: Path
    classifier: Path


CURVE_COLUMNS = ["epoch", "train/loss", "train/lr"]  # without the online k-NN: a key of `run` sets it


def publish_arm(
    run: StageRun, folder: Path, result: "Pretrained", data: "Images", starts: Sequence[Path], accept: bool
) -> None:
    """Write a trained arm, and log its encoder as a model of the registry.

    An arm whose checks failed is written too. Its metric `trained` is false, and its provenance has the faults.

    Args:
        run: the stage.
        folder: of the arm. It gets `encoder/`, the heads, `curves.csv` and `metrics.json`. Where an average of the
            encoder is published, `encoder/last/` has the encoder of the last step.
        result: the finished pre-training.
        data: the images that it was trained on.
        starts: encoder folders that it started from. `train/pflop_total` includes their compute.
        accept: take the arm even if its checks failed. `run.accept` does the same by name.

    Raises:
        NotTrained: the checks failed, and the arm is not accepted. Everything is written.
    """
    checks, trained = result.checks, not result.checks.faults
    accepted = not trained and (accept or run.spec.arm in run.params.run.accept)
    out, model, history = run.out(folder), result.model, result.progression.history
    save_heads(out, model.heads(), model.first_fc())
    with (out / CURVES).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "epoch": int(row["epoch"])} for row in history)
    pflop = result.progression.train_flops / 1e15
    values = {
        "train/loss": round(history[-1]["train/loss"], 6),
        "train/pflop": round(pflop, 9),
        "train/pflop_total": round(pflop + sum(_pflop_of(start) for start in starts), 9),
        "train/epochs": len(history),
        "trained": trained,
        **checks.metrics,
        "encoder_parameters": sum(p.numel() for p in model.encoder.parameters()),
    }
    provenance = run.provenance | {
        "computed": dict(result.computed),
        "metrics": values,
        "checks": {"faults": dict(checks.faults), "warnings": checks.warnings, "accepted": accepted},
    }
    if model.published_encoder is not model.encoder:
        last = out / ENCODER / LAST
        of_last = {name: value for name, value in values.items() if not name.startswith("features/")}
        its = provenance | {"metrics": of_last}  # the measures of features are the average's
        save_encoder(last, model.encoder, run.params.model, run.params.data, data.normalization, its)
        seal(last)
    _publish_encoder(run, folder, model.published_encoder, data.normalization, provenance)
    run.tracker.tag("trained", str(trained).lower())
    for warning in checks.warnings:
        print(f"warning: {run.spec.arm}: {warning}", flush=True)
    if accepted:
        print(f"warning: {run.spec.arm} did not train, and is accepted: {'; '.join(checks.faults)}", flush=True)
    elif not trained:
        raise NotTrained(_not_trained(run.spec.arm, folder, checks.said))


def _not_trained(arm: str, folder: Path, said: str) -> str:
    """Return the message that the checks of an arm failed: what `said` of it, and how to take it as it is."""
    return (
        f"{arm} did not train: {said}; {folder} has it with `trained: false`, take it as it is with "
        f"`lgp {arm} --accept`, or with run.accept: [{arm}] for `dvc repro`"
    )


def publish_imported(run: StageRun, folder: Path, imported: "Imported") -> None:
    """Write an imported encoder as an arm, and log it as a model of the registry.

    Args:
        run: the stage.
        folder: of the arm. It gets `encoder/`, `metrics.json`, and the projector, if there is one, as heads.
        imported: encoder and projector, and the statistics that the encoder was trained with.
    """
    save_heads(run.out(folder), imported.projector, imported.first_fc)
    values = {"encoder_parameters": sum(p.numel() for p in imported.encoder.parameters())}
    origin = {"layout": imported.layout, "normalization_from": imported.normalization_from}
    _publish_encoder(
        run, folder, imported.encoder, imported.normalization, run.provenance | origin | {"metrics": values}
    )


def publish_baseline(run: StageRun, folder: Path, encoder: "VisionTransformer | None", data: "Images") -> None:
    """Write a baseline arm: an untrained encoder, or raw pixels in its place.

    Args:
        run: the stage.
        folder: of the arm. It gets `encoder/`, empty heads and `metrics.json`.
        encoder: with random weights; None for raw pixels.
        data: the images that it will be evaluated on.
    """
    out = run.out(folder)
    save_heads(out, {}, None)
    if encoder is not None:
        values = {"encoder_parameters": sum(p.numel() for p in encoder.parameters())}
        _publish_encoder(run, folder, encoder, data.normalization, run.provenance | {"metrics": values})
        return
    values = {"encoder_parameters": 0}
    save_pixels(out / ENCODER, data, run.provenance | {"metrics": values})
    write_metrics(run, out / ARM_METRICS, values)
    seal_arm(out)


def _publish_encoder(
    run: StageRun,
    folder: Path,
    encoder: "VisionTransformer",
    normalization: "Normalization",
    provenance: dict[str, Any],
) -> None:
    out = run.out(folder)
    save_encoder(out / ENCODER, encoder, run.params.model, run.params.data, normalization, provenance)
    run.tracker.will_register(folder / ENCODER, run.spec.arm, encoder_digest(out / ENCODER))
    write_metrics(run, out / ARM_METRICS, provenance["metrics"])
    seal_arm(out)


def _pflop_of(encoder: Path) -> float:
    """Return the compute of an encoder's training in PFLOP; 0 where it is unknown (an imported encoder)."""
    return float(read_provenance(encoder).get("metrics", {}).get("train/pflop_total", 0))


def publish_outcome(run: StageRun, encoder: Path, places: Places, outcome: "Outcome", classes: list[str]) -> None:
    """Write metrics, predictions and the classifier. Track the metrics, and the confusion matrix as a picture.

    The metric file contains the digest of the encoder. Files of different encoders therefore always differ.

    Args:
        run: the stage.
        encoder: the folder that was evaluated.
        places: the outputs.
        outcome: what was measured, and the classifier that is kept.
        classes: names of the classes.
    """
    write_predictions(run.out(places.predictions), outcome.predictions)
    values = {**outcome.metrics, "encoder": encoder_digest(encoder)}
    write_metrics(run, run.out(places.metrics), values)
    assert outcome.classifier is not None
    save_classifier(
        run.out(places.classifier), encoder, outcome.classifier, classes, run.provenance | {"metrics": values}
    )
    seal(run.out(places.classifier))
    print(f"{run.spec.arm} / {run.spec.task}: {outcome.metrics['test/top1']:.1f} % top-1 on test", flush=True)
    run.tracker.log_confusion(outcome.predictions, classes)
