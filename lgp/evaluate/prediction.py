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
    """Return the classifiers of all arms whose encoder is still the one that they were made of, the best on val first.

    Of equally good ones the one whose probabilities are better comes first (their Brier score on val), then the one
    with more labels. With few validation images many are equally good.
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
    return sorted(found, key=_worse)


def _worse(kept: Kept) -> tuple[float, float, float]:
    top1, brier = kept.metrics["val/top1"], kept.metrics.get("val/brier", math.inf)
    return -np.nan_to_num(top1, nan=-1.0), brier, -kept.metrics["labels"]


def best_plain_classifier(models: Path, arm: str) -> Path | None:
    """Return the classifier of an arm that is best on val among those that timm loads, None without one."""
    plain = (kept.folder for kept in kept_classifiers(models) if kept.plain and kept.name.startswith(f"{arm}/"))
    return next(plain, None)


def find_classifier(models: Path, given: str | None, most_labels: bool = False) -> Path:
    """Return the folder of a classifier.

    Args:
        models: folder of the arms.
        given: `ARM/TASK`, or a path of a classifier folder. None: the best on val.
        most_labels: take the best on val of those with the most labels, because val is too small to choose by.

    Raises:
        LgpError: there is none, or none of that name, or its encoder was trained anew since.
    """
    if given is not None and (Path(given) / CONFIG).exists():
        return Path(given)
    found = kept_classifiers(models)
    if most_labels:
        found.sort(key=lambda classifier: -classifier.metrics["labels"])  # which keeps the order of as many labels
    kept = {classifier.name: classifier.folder for classifier in found}
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
