"""Parameters for a data source: sizes that suit its images, and epochs that fit into a time on this machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lgp.compute.units import time_text
from lgp.data.advice import (
    DIGIT_SIZE,
    label_values,
    smallest_crop,
    suggest_few_labels,
    suggest_settings,
)
from lgp.data.inspection import Inspection
from lgp.params.editing import with_values
from lgp.params.file import Params
from lgp.pretrain.expected_time import fine_tuning_minutes

ARMS = ("mim", "cl", "graft")
LEAST_EPOCHS = 5
MOST_TIMES = 10  # the epochs of the preset
WARMUP_SHARE = 0.1
KEPT = {
    "data": (
        *("source", "columns", "labels", "test_share", "val_share", "max_unreadable_share", "storage"),
        "store_short_side",
    ),
}
FEW_SHOT_RECIPE = "10pct"  # the recipe of fine-tuning that images per class take over

Speed = Callable[[Params, str], float]


@dataclass(frozen=True)
class Proposal:
    """Parameters that suit a data source.

    Attributes:
        values: `section.key` → value, to be written over the preset.
        params: the preset with these values.
        speeds: arm → measured images a second.
        minutes: arm → expected minutes of its training steps.
        notes: what could not be had, a line each.
    """

    values: dict[str, Any]
    params: Params
    speeds: dict[str, float]
    minutes: dict[str, float]
    notes: list[str]


def preset_for(inspection: Inspection) -> str:
    """Return the preset whose recipe suits the images: of digits for up to 12 pixels, else of small photographs."""
    return "digits" if inspection.sample.short_side.median <= DIGIT_SIZE else "cifar10-cpu"


def propose(inspection: Inspection, minutes: float, params: Params, cuda: bool, speed: Speed) -> Proposal:
    """Choose what suits the images and labels, measure the steps, and give the pre-trainings as many epochs as fit.

    Args:
        inspection: of the source.
        minutes: that mim, cl and graft take together.
        params: the preset, with the user's own `data.source` and `run`.
        cuda: whether a GPU trains.
        speed: measures the images a second of an arm, as `speed.images_per_second` does.
    """
    images = inspection.parts["train"]
    values = {**_sizes(inspection, params, cuda), **_labels(inspection, params)}
    sized = with_values(params, values)
    speeds = {arm: speed(sized, arm) for arm in ARMS}
    values["finetuned"], notes = _affordable(sized, inspection, speeds["cl"], minutes)
    for arm, number in fitting_epochs(sized, speeds, images, minutes).items():
        values |= {f"{arm}.epochs": number, f"{arm}.warmup_epochs": max(round(WARMUP_SHARE * number), 1)}
    proposed = with_values(params, values)
    expected = {arm: training_minutes(proposed, arm, speeds, images) for arm in ARMS}
    return Proposal(values, proposed, speeds, expected, notes + _notes(sum(expected.values()), minutes, images))


def _sizes(inspection: Inspection, params: Params, cuda: bool) -> dict[str, Any]:
    good = suggest_settings(inspection, cuda)
    return {
        "data.image_size": good.image_size,
        "data.channels": good.channels,
        "data.max_train_images": None,
        "data.max_test_images": None,
        **({} if params.model.timm else {"model.patch_size": good.patch_size}),
        "contrastive.views.crop_scale_min": min(
            params.contrastive.views.crop_scale_min, smallest_crop(good.image_size)
        ),
        **{f"{arm}.batch_size": good.batch_size for arm in ARMS},
    }


def _labels(inspection: Inspection, params: Params) -> dict[str, Any]:
    """Choose few labels, and which of them to fine-tune with. Images per class take the recipe of a share."""
    few = suggest_few_labels(inspection)
    tuned = [name for name in params.finetuned if name in few.parts] or few.parts[-1:]
    spread = [name for name in params.propagated if name in few.parts] or few.parts[-1:]
    spread += [name for name in few.names if name not in few.parts]
    chosen = [name for name in params.selected if name in few.parts]
    values = {**label_values(few), "propagated": spread, "selected": chosen, "finetuned": tuned}
    recipe = params.finetune[FEW_SHOT_RECIPE].model_dump(mode="json", exclude_unset=True)
    return values | {f"finetune.{name}": recipe for name in tuned if name not in params.finetune}


def _affordable(params: Params, inspection: Inspection, cl_speed: float, minutes: float) -> tuple[list[str], list[str]]:
    """Return the labels whose fine-tuning takes no longer than the pre-training, and a note for each other one."""
    takes = {name: fine_tuning_minutes(params, inspection, name, cl_speed) for name in params.finetuned}
    notes = [
        f"fine-tuning with {name} would take about {time_text(expected / 60)}: it is not in `finetuned`"
        for name, expected in takes.items()
        if expected > minutes
    ]
    return [name for name, expected in takes.items() if expected <= minutes], notes


def kept_values(own: Params, preset: Params) -> dict[str, Any]:
    """Return what stays of a user's own file as `section.key`: where the images and labels are, and how to compute."""
    kept: dict[str, Any] = {}
    for section in ("data", "run"):
        mine, theirs = (getattr(p, section).model_dump(mode="json", exclude_none=True) for p in (own, preset))
        keys = KEPT.get(section, mine.keys())
        kept |= {f"{section}.{key}": mine[key] for key in keys if key in mine and mine[key] != theirs.get(key)}
    sources = kept.get("data.source", [])
    return kept | ({"data.source": sources[0]} if len(sources) == 1 else {})


def images_an_epoch(params: Params, arm: str, images: int) -> int:
    """Return the images of an epoch: its incomplete last batch is dropped."""
    size: int = getattr(params, arm).batch_size
    return max(images // size, 1) * size


def training_minutes(params: Params, arm: str, speeds: Mapping[str, float], images: int) -> float:
    """Return the minutes of an arm's training steps."""
    epochs: int = getattr(params, arm).epochs
    return epochs * images_an_epoch(params, arm, images) / speeds[arm] / 60


def fitting_epochs(params: Params, speeds: Mapping[str, float], images: int, minutes: float) -> dict[str, int]:
    """Scale the epochs of the three arms alike, so that together they take the given time.

    The ratio of the preset stays: mim and graft have about the compute of cl. Every arm has five epochs or more, and at
    most ten times those of the preset.
    """
    preset: dict[str, int] = {arm: getattr(params, arm).epochs for arm in ARMS}
    now = sum(training_minutes(params, arm, speeds, images) for arm in ARMS)
    times = min(max(minutes / now, LEAST_EPOCHS / min(preset.values())), MOST_TIMES)
    return {arm: max(round(times * epochs), LEAST_EPOCHS) for arm, epochs in preset.items()}


def _notes(expected: float, minutes: float, images: int) -> list[str]:
    """Say where the epochs are at their bounds."""
    if expected > 1.2 * minutes:
        fitting = int(images * minutes / expected)
        return [
            f"the fewest epochs of {images:,} images take {expected:.0f} minutes, not {minutes:g}: set "
            f"data.max_train_images to {fitting:,}, or give it more time"
        ]
    if expected < 0.8 * minutes:
        return [f"the epochs are at their bound, {MOST_TIMES} times the preset's: more would learn little more"]
    return []
