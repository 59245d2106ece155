"""The comparison of the evaluations of one task over arms, their parameters and seeds, from the runs of the store."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lgp.errors import LgpError
from lgp.evaluate.outcome import Outcome
from lgp.evaluate.statistics import paired_gap, students_interval
from lgp.report.outcomes import correct_by_subset
from lgp.workflow.mlflow_store import TrackedResult
from lgp.workflow.origins import NAMED

TOP1 = "test/top1"
DIGEST, SEED = "encoder.digest", "encoder.seed"
OWN_COLUMNS = ("encoder.policy", "encoder.objective")
HEADER = ["arm", "policy", "objective", "differs in", "seeds", "mean", "95 % interval", "behind the first"]

Predictions = Callable[[TrackedResult], pd.DataFrame | None]


@dataclass(frozen=True)
class Compared:
    """Evaluations that differ in the seed alone.

    Attributes:
        arm: of the encoders.
        values: the parameters that made them, without the seed.
        by_seed: seed → its newest run; an encoder without a seed has its digest instead.
    """

    arm: str
    values: dict[str, str]
    by_seed: dict[str, TrackedResult]

    @property
    def mean(self) -> float:
        """Top-1 on test in percent, the mean over seeds."""
        return float(np.mean(self.top1()))

    def top1(self) -> list[float]:
        """Return the accuracy of each seed."""
        return [run.metrics[TOP1] for run in self.by_seed.values()]

    def interval(self) -> tuple[float, float]:
        """Return the interval over seeds; of a single seed that over test images and subsets of labels."""
        if len(self.by_seed) > 1:
            return students_interval(self.top1())
        (run,) = self.by_seed.values()
        return run.metrics[f"{TOP1}_low"], run.metrics[f"{TOP1}_high"]


def grouped(results: Sequence[TrackedResult]) -> list[Compared]:
    """Group runs of one task that differ in the seed alone, the best mean first. Of one seed the newest run counts.

    Args:
        results: the newest first. Runs that do not say what encoder they evaluate are left out.
    """
    groups: dict[tuple[object, ...], Compared] = {}
    for run in results:
        if DIGEST not in run.params:
            continue
        values = {key: value for key, value in run.params.items() if key not in ("seed", "arm", "task", DIGEST, SEED)}
        of_encoder = json.loads(run.tags.get("encoder_params", "{}"))
        values |= {key: value for key, value in of_encoder.items() if key not in NAMED}
        values["labels"] = f"{run.metrics['labels']:g}"
        group = groups.setdefault((run.arm, *sorted(values.items())), Compared(run.arm, values, {}))
        group.by_seed.setdefault(run.params.get(SEED, run.params[DIGEST]), run)
    return sorted(groups.values(), key=lambda group: -group.mean)


def behind(first: Compared, other: Compared, predictions: Predictions) -> str:
    """Say by how many points `other` is behind `first`, with the paired interval.

    Several seeds in common are paired by seed. With one in common, or one each, predictions are paired by subset and
    test image.

    Args:
        first: the best.
        other: another.
        predictions: reads the predictions of a run; None where the store does not have them.
    """
    common = [seed for seed in first.by_seed if seed in other.by_seed]
    if len(common) == 1:
        return _behind_on_images(first.by_seed[common[0]], other.by_seed[common[0]], predictions)
    if not common and len(first.by_seed) == len(other.by_seed) == 1:
        (one,), (two,) = first.by_seed.values(), other.by_seed.values()
        return _behind_on_images(one, two, predictions)
    if not common:
        return "no seed in common"
    gaps = [first.by_seed[seed].metrics[TOP1] - other.by_seed[seed].metrics[TOP1] for seed in common]
    low, high = students_interval(gaps)
    return f"{np.mean(gaps):.1f} [{low:+.1f}, {high:+.1f}] ({len(common)} seeds)"


def _behind_on_images(first: TrackedResult, other: TrackedResult, predictions: Predictions) -> str:
    points = f"{first.metrics[TOP1] - other.metrics[TOP1]:.1f}"
    tables = [predictions(run) for run in (first, other)]
    outcomes = [Outcome({}, table) for table in tables if table is not None]
    if len(outcomes) < 2:
        return f"{points} (no predictions)"
    try:
        gap = paired_gap(*correct_by_subset(outcomes[0], outcomes[1], ""))
    except LgpError:
        return f"{points} (other images)"
    return f"{points} [{gap.low:+.1f}, {gap.high:+.1f}]"


def rows(groups: Sequence[Compared], predictions: Predictions) -> list[list[str]]:
    """Return a row of `HEADER` for each group."""
    return [
        [
            group.arm,
            *(group.values.get(column, "–").replace("'", "") for column in OWN_COLUMNS),
            _differences(group, groups) or "–",
            ", ".join(sorted(seeds(group), key=lambda seed: (len(seed), seed))),
            f"{group.mean:.1f}",
            "[{:.1f}, {:.1f}]".format(*group.interval()),
            "–" if group is groups[0] else behind(groups[0], group, predictions),
        ]
        for group in groups
    ]


def seeds(group: Compared) -> list[str]:
    """Return the seeds of a group; – for an encoder without one."""
    return [run.params.get(SEED, "–") for run in group.by_seed.values()]


def _differences(group: Compared, groups: Sequence[Compared]) -> str:
    """Name the parameters, besides those with a column, in which the groups of one arm differ, with their values."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for other in groups:
        if other.arm == group.arm:
            for key in (group.values.keys() | other.values.keys()) - set(OWN_COLUMNS):
                found[key] |= {other.values.get(key, "–")}
    keys = sorted(key for key, values in found.items() if len(values) > 1)
    return ", ".join(f"{key}={group.values.get(key, '–')}" for key in keys)
