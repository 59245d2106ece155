"""The minutes of a whole pipeline, estimated from measured training steps.

| part | estimate |
|---|---|
| prepare | every image as long as one of the sample took to decode, in one process |
| pre-training | the measured steps of mim, cl and graft; without reading and views |
| fine-tuning | every rate, subset and arm; an image takes 3/8 of one of cl, which has two views and momentum |
| evaluation | linear heads, logistic regression and features, by their products at the speed of cl's |
| start of commands | imports, for each command |
"""

from collections.abc import Mapping

from lgp.data.inspection import Inspection
from lgp.params.file import Params
from lgp.params.labels import ALL_LABELS, shot_name
from lgp.pretrain.plan import stage_cost

TUNED_TO_CL = 3 / 8  # forward and backward of a view, to two views forward, backward, and forward once more
FORWARD_TO_CL = 1 / 8
FIT_STEPS = 100  # of logistic regression, about
HEAD_STEP_S = 0.015  # a step of the probe's 70 heads takes no less: benchmarks/
FIT_S = 0.05  # nor a fit


def expected_minutes(
    params: Params, inspection: Inspection, speeds: Mapping[str, float], training: Mapping[str, float], start_s: float
) -> dict[str, float]:
    """Estimate the parts of the pipeline, in minutes.

    Args:
        params: the whole file.
        inspection: of the source.
        speeds: arm → images a second.
        training: arm → minutes of its pre-training.
        start_s: seconds until a command begins its work.
    """
    names = params.few_labels, params.finetuned
    of_each_arm = 1 + len(names[0]) + len(params.propagated) + len(params.selected)
    tasks = len(params.arms) * of_each_arm + len(params.finetuned_arms) * len(names[1])
    labelled = bool(inspection.train_labels)
    return {
        "prepare": inspection.images * inspection.sample.seconds / 60,
        "pre-training": sum(training.values()),
        "fine-tuning": sum(fine_tuning_minutes(params, inspection, name, speeds["cl"]) for name in names[1]),
        "evaluation": evaluation_minutes(params, inspection, speeds["cl"]) if labelled else 0.0,
        "start of commands": (len(params.arms) + 3 + tasks * labelled) * start_s / 60,
    }


def labels_of(params: Params, inspection: Inspection, name: str) -> int:
    """Return the number of labelled images of a name in `few_labels` or `finetuned`; of a list, that of all."""
    classes, labels = len(inspection.train_labels), sum(inspection.train_labels.values())
    each: dict[str, float] = {shot_name(shot): shot for shot in params.labels.shots}
    each |= {share: max(1, round(part * labels / max(classes, 1))) for share, part in params.labels.shares.items()}
    return labels if name == ALL_LABELS else min(int(each.get(name, labels) * classes), labels)


def fine_tuning_minutes(params: Params, inspection: Inspection, name: str, cl_speed: float) -> float:
    """Return the minutes of fine-tuning all arms with some labels."""
    recipe = params.recipe(name)
    runs = len(params.finetuned_arms) * len(recipe.base_lrs) * (1 if name == ALL_LABELS else params.labels.subsets)
    return runs * recipe.epochs * labels_of(params, inspection, name) * TUNED_TO_CL / cl_speed / 60


def evaluation_minutes(params: Params, inspection: Inspection, cl_speed: float) -> float:
    """Return the minutes of features, linear heads and logistic regression of all arms. Pixels are wide features."""
    flops = cl_speed * stage_cost("cl", params).flops_per_image
    pixels = params.data.image_size**2 * params.data.channels
    seconds = 0.0
    for arm in params.arms:
        width = pixels if arm == "pixels" else params.model.width * params.features.blocks
        seconds += inspection.images * FORWARD_TO_CL / cl_speed * (arm != "pixels")
        seconds += _heads_seconds(params, inspection, width, flops)
        seconds += sum(_fits_seconds(params, inspection, name, width, flops) for name in params.few_labels)
    return seconds / 60


def _heads_seconds(params: Params, inspection: Inspection, width: int, flops: float) -> float:
    linear, classes = params.linear, len(inspection.train_labels)
    labels = sum(inspection.train_labels.values())
    heads = len(linear.base_lrs) * len(linear.weight_decays)
    steps = linear.epochs * -(-labels // linear.batch_size)
    return max(4.0 * linear.epochs * labels * width * classes * heads / flops, HEAD_STEP_S * steps)


def _fits_seconds(params: Params, inspection: Inspection, name: str, width: int, flops: float) -> float:
    few, classes = params.fewshot, len(inspection.train_labels)
    fits = params.labels.subsets * (len(few.c_grid) * few.folds + 1)
    return fits * max(4.0 * FIT_STEPS * labels_of(params, inspection, name) * width * classes / flops, FIT_S)
