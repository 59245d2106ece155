"""The inputs of the report: metrics and predictions of every arm and task."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lgp.errors import LgpError
from lgp.evaluate.outcome import Outcome
from lgp.evaluate.results_files import read_metrics, read_predictions
from lgp.models.files import read_arm_metrics
from lgp.params.arms import BASELINES, how_to_evaluate


@dataclass(frozen=True)
class ArmOutcomes:
    """The outcomes of one arm.

    Attributes:
        arm: its name.
        tasks: outcomes by task: `linear`, `fewshot-1pct`, `finetune-10pct` and the like.
        trained: False for an arm whose checks failed at the end of its training.
    """

    arm: str
    tasks: Mapping[str, Outcome]
    trained: bool = True

    @property
    def is_baseline(self) -> bool:
        """Whether the arm is an untrained baseline."""
        return self.arm in BASELINES

    @property
    def may_win(self) -> bool:
        """Whether the arm may be the champion: it is no baseline, and its training passed its checks."""
        return self.trained and not self.is_baseline


@dataclass(frozen=True)
class Inputs:
    """The files that the report reads.

    Attributes:
        metrics: arm and task → metric file.
        predictions: arm and task → file of predictions.
        arms: arm → folder of its pre-training.
    """

    metrics: Mapping[tuple[str, str], Path]
    predictions: Mapping[tuple[str, str], Path]
    arms: Mapping[str, Path]

    def read(self) -> list[ArmOutcomes]:
        """Read the outcomes of all arms. Raise `Damaged` for a file that is."""
        return [
            ArmOutcomes(
                arm,
                {task: self._outcome(arm, task) for of, task in self.metrics if of == arm},
                bool(read_arm_metrics(folder).get("trained", True)),
            )
            for arm, folder in self.arms.items()
        ]

    def _outcome(self, arm: str, task: str) -> Outcome:
        remedy = how_to_evaluate(arm, task)
        metrics = read_metrics(self.metrics[arm, task], remedy)
        return Outcome(metrics, read_predictions(self.predictions[arm, task], remedy))


def fewest_labels(arms: list[ArmOutcomes]) -> str:
    """Name the frozen-feature task with the fewest labels."""
    few = [task for task in arms[0].tasks if task.startswith("fewshot-")]
    return min(few, key=lambda task: arms[0].tasks[task].metrics["labels"])


def leader(arms: list[ArmOutcomes]) -> ArmOutcomes | None:
    """Return the arm with the best validation accuracy of frozen features at the fewest labels.

    Baselines, and arms whose training failed its checks, do not count. None where no other arm is there.
    """
    fewest = fewest_labels(arms)
    return max((a for a in arms if a.may_win), key=lambda a: a.tasks[fewest].metrics["val/top1"], default=None)


def confidence_by_subset(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidence of each prediction, and whether it is right, both (subsets, images)."""
    tables = [table.sort_values("id") for _, table in outcome.predictions.groupby("subset")]
    confidence = np.stack([table["confidence"].to_numpy(dtype=np.float64) for table in tables])
    return confidence, np.stack(
        [(table["prediction"] == table["label"]).to_numpy(dtype=np.float64) for table in tables]
    )


def correct_by_subset(a: Outcome, b: Outcome, said: str) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of two outcomes which predictions are right, as bool (subsets, images) of the same images.

    Args:
        a: the first outcome.
        b: the second.
        said: what the two are, for the error.

    Raises:
        LgpError: the predictions are of different subsets or images.
    """
    rows = [x.predictions.sort_values(["subset", "id"], ignore_index=True) for x in (a, b)]
    same = ["subset", "id", "label"]
    if not rows[0][same].equals(rows[1][same]):
        raise LgpError(
            f"the predictions of {said} are of different subsets or test images: run both evaluations again on the "
            "same prepared data"
        )
    subsets = rows[0]["subset"].nunique()
    first, second = ((r["label"] == r["prediction"]).to_numpy().reshape(subsets, -1) for r in rows)
    return first, second


def accuracy_per_class(predictions: pd.DataFrame, classes: int) -> np.ndarray:
    """Return accuracy per class in percent over all subsets, (classes,); NaN for a class without a test image."""
    correct = (predictions["label"] == predictions["prediction"]).groupby(predictions["label"]).mean()
    return 100 * correct.reindex(range(classes)).to_numpy(dtype=np.float64)


def accuracy_by_depth(outcome: Outcome) -> list[float]:
    """Return k-NN accuracy in percent after each block, from the task `linear`; empty where it was not measured."""
    found = {name: value for name, value in outcome.metrics.items() if name.startswith("test/knn_top1_block")}
    return [found[f"test/knn_top1_block{b}"] for b in range(len(found))]


def worst_mistakes(predictions: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return the wrong predictions of the first subset with the highest confidence, at most `most`."""
    first = predictions[(predictions["subset"] == 0) & (predictions["label"] != predictions["prediction"])]
    return first.sort_values(["confidence", "id"], ascending=[False, True]).head(most)
