"""Predictions of a kept classifier for the images of any source, image by image, in bounded memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lgp.data.sources.offers import Offers
from lgp.errors import LgpError
from lgp.features.of_source import left_out, source_batches
from lgp.models.classifier_folder import HEAD, OpenedClassifier
from lgp.models.files import CLASSIFIERS, CONFIG, ENCODER, PROVENANCE, WEIGHTS, encoder_digest, read_provenance

KINDS = {
    "path": "string",
    "class": "string",
    "probability": "float64",
    "runner_up": "string",
    "margin": "float64",
    "reason": "string",
}  # the columns of predictions


@dataclass(frozen=True)
class Kept:
    """A classifier of the project, with the metrics of its evaluation."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def name(self) -> str:
        """`ARM/TASK`, as users write it."""
        return f"{self.folder.parent.parent.name}/{self.folder.name}"

    @property
    def plain(self) -> bool:
        """Whether timm alone loads it with its head."""
        return not (self.folder / HEAD).exists()


def kept_classifiers(models: Path) -> list[Kept]:
    """Return the classifiers of all arms whose encoder is still the one that they were made of, the best first.

    The best has the most labels among those that val cannot tell from the most accurate one: their 95 % intervals meet.
    With few validation images these are many, and which one is the most accurate is chance. Then accuracy on val
    decides, then the probabilities (their Brier score on val).
    """
    found = []
    digest_of = cache(encoder_digest)
    for folder in sorted(models.glob(f"*/{CLASSIFIERS}/*")):
        files = (folder / WEIGHTS, folder / CONFIG, folder / PROVENANCE)
        if folder.name.startswith(".") or not all(file.exists() for file in files):
            continue
        metrics = read_provenance(folder)["metrics"]
        encoder = folder.parent.parent / ENCODER
        if (encoder / WEIGHTS).exists() and metrics["encoder"] == digest_of(encoder):
            found.append(Kept(folder, metrics))
    bound = max(found, key=_accuracy).metrics.get("val/top1_low", math.nan) if found else math.nan
    return sorted(found, key=lambda kept: _worse(kept, bound))


def _accuracy(kept: Kept) -> float:
    return float(np.nan_to_num(kept.metrics["val/top1"], nan=-1.0))  # without val, below all


def _worse(kept: Kept, bound: float) -> tuple[bool, float, float, float, float]:
    """Return what sorts classifiers, given the lower end of the most accurate one's interval."""
    labels, brier = kept.metrics["labels"], kept.metrics.get("val/brier", math.inf)
    as_good = bool(kept.metrics.get("val/top1_high", math.nan) >= bound)
    return not as_good, -labels if as_good else 0.0, -_accuracy(kept), brier, -labels


def best_plain_classifier(models: Path, arm: str) -> Path | None:
    """Return the best classifier of an arm among those that timm loads, None without one."""
    plain = (kept.folder for kept in kept_classifiers(models) if kept.plain and kept.name.startswith(f"{arm}/"))
    return next(plain, None)


def find_classifier(models: Path, given: str | None) -> Path:
    """Return the folder of a classifier.

    Args:
        models: folder of the arms.
        given: `ARM/TASK`, or a path of a classifier folder. None: the best.

    Raises:
        LgpError: there is none, or none of that name, or its encoder was trained anew since.
    """
    if given is not None and (Path(given) / CONFIG).exists():
        return Path(given)
    kept = {found.name: found.folder for found in kept_classifiers(models)}
    if not kept:
        raise LgpError(
            "there is no classifier yet: `lgp fewshot ARM LABELS`, `lgp linear ARM` or `dvc repro` make them"
        )
    if given is None:
        return next(iter(kept.values()))
    if given not in kept and (_folder_of(models, given) / CONFIG).exists():
        raise LgpError(
            f"the classifier {given} is of another encoder than its arm has now: evaluate the arm again "
            f"(`dvc repro`), or give {_folder_of(models, given)} to take it as it is"
        )
    if given not in kept:
        raise LgpError(f"no classifier {given!r}: there are {', '.join(kept)}, or give the path of a classifier folder")
    return kept[given]


def _folder_of(models: Path, name: str) -> Path:
    arm, _, task = name.partition("/")
    return models / arm / CLASSIFIERS / task


def predictions(
    classifier: OpenedClassifier, offers: Offers, device: torch.device, workers: int | None = None
) -> Iterator[pd.DataFrame]:
    """Yield a row per image of a source, chunk by chunk: path, class, probability, runner-up, margin and reason.

    The margin is the difference of the two highest probabilities. An image that cannot be read has no class, and the
    reason. Files that are no image of the source come last, with theirs.

    Args:
        classifier: opened on the device.
        offers: the source.
        device: where to compute.
        workers: processes that decode. None: one per core.
    """
    for batch in source_batches(offers, classifier.config, device, workers):
        table = pd.DataFrame({"path": batch.paths, "reason": batch.reasons})
        if batch.rows:
            with torch.inference_mode():
                logits = classifier.logits(batch.images)
            of_read = _described(logits.double().softmax(1).cpu().numpy(), classifier.classes)
            table = table.join(of_read.set_index(pd.Index(batch.rows)))
        yield table.reindex(columns=list(KINDS)).astype(KINDS)
    if listed := left_out(offers):
        yield pd.DataFrame(listed, columns=["path", "reason"]).reindex(columns=list(KINDS)).astype(KINDS)


def _described(probabilities: np.ndarray, classes: list[str]) -> pd.DataFrame:
    """Return the two best classes of each image, with the probability and the margin of the best."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :2]
    best = np.take_along_axis(probabilities, order, axis=1)
    names = np.array(classes, dtype=object)
    alone = order.shape[1] == 1
    return pd.DataFrame(
        {
            "class": names[order[:, 0]],
            "probability": best[:, 0],
            "runner_up": "" if alone else names[order[:, -1]],
            "margin": best[:, 0] if alone else best[:, 0] - best[:, 1],
        }
    )
