"""The paths of the files that the stages write and read."""

from pathlib import Path
from typing import TYPE_CHECKING

from lgp.errors import LgpError
from lgp.models.files import CLASSIFIERS

if TYPE_CHECKING:
    from lgp.params.file import Params
    from lgp.workflow.restored import KeptResult

PREPARED = Path("data/prepared")
LABELS = Path("data/labels")
HELD_OUT = Path("held_out.csv")
MODELS = Path("models")
METRICS = Path("metrics")
PREDICTIONS = Path("predictions")
REPORTS = Path("reports")
ARMS = ("graft", "cl", "mim")  # the first that has an encoder is the default of a tool


def arm_folder(arm: str) -> Path:
    """The folder of a pre-training: `encoder/`, `heads.safetensors`, `curves.csv`, `metrics.json`, `classifiers/`."""
    return MODELS / arm


def encoder_folder(arm: str) -> Path:
    """The encoder that timm loads."""
    return arm_folder(arm) / "encoder"


def encoder_files(arm: str) -> list[Path]:
    """The files of an encoder folder that decide its features."""
    return [encoder_folder(arm) / "model.safetensors", encoder_folder(arm) / "config.json"]


def default_arm() -> str:
    """The arm whose encoder a tool takes if none is named. Raise `LgpError` without any."""
    for arm in ARMS:
        if all(file.exists() for file in encoder_files(arm)):
            return arm
    raise LgpError(
        f"none of {', '.join(ARMS)} has an encoder yet: run `dvc repro mim cl graft`, or give another arm, for example "
        "`--arm pixels` after `lgp baseline pixels`"
    )


def heads_file(arm: str) -> Path:
    """The heads of a pre-training: decoder, projector."""
    return arm_folder(arm) / "heads.safetensors"


def metrics_file(arm: str, task: str) -> Path:
    """The flat metrics of an arm and task."""
    return METRICS / f"{arm}-{task}.json"


def predictions_file(arm: str, task: str) -> Path:
    """The predictions of an arm and task: a row per test image and subset."""
    return PREDICTIONS / f"{arm}-{task}.parquet"


def classifier_folder(arm: str, task: str) -> Path:
    """The classifier of an arm and task, which timm loads."""
    return arm_folder(arm) / CLASSIFIERS / task


def kept_results(params: "Params") -> "list[KeptResult]":
    """The files of every evaluation that the parameters name."""
    from lgp.workflow.restored import KeptResult

    return [
        KeptResult(
            arm,
            task,
            metrics_file(arm, task),
            predictions_file(arm, task),
            classifier_folder(arm, task),
            encoder_folder(arm),
        )
        for arm in params.arms
        for task in params.tasks_of(arm)
    ]


def conflict_file(arm: str) -> Path:
    """The cosine of the gradients of MIM and CL: a row per part of the encoder and batch."""
    return REPORTS / "conflict" / f"{arm}.csv"
