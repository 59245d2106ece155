"""What an evaluation yields."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """Flat metrics of one task, in percent, and a row per test image (and subset) with the prediction."""

    metrics: Metrics
    predictions: pd.DataFrame


@dataclass(frozen=True)
class ArmResults:
    """Metrics of one arm: of the linear task, and of each few-label share by name."""

    arm: str
    linear: Metrics
    fewshot: Mapping[str, Metrics]
