"""Values that are valid key by key, but with which no training works: rates of nothing, crops of nothing.

These checks refuse and change no result. `lgp.params.file` alone calls them, so that the code digests leave them out.
"""

import itertools
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lgp.params.pretrain import TrainingParams

if TYPE_CHECKING:
    from lgp.params.file import Params

REFERENCE_BATCH = 256  # as in lgp.training.optimizer, which imports torch
MAX_IMAGE_SIZE = 4096
MAX_PARAMETERS = 1e11  # of the encoder and of each head
MIN_RATE = 1e-12  # a smaller one moves no weight in single precision
RANGES = {  # keys → smallest and largest value; a zero that a key allows means "none" and stays allowed
    "*base_lr": (MIN_RATE, 1e4),
    "*base_lrs": (MIN_RATE, 1e4),
    "*epochs": (1e-6, 1e6),
    "*.clip_norm": (1e-4, 1e6),  # Adam divides by the gradient plus 1e-8
    "contrastive.temperature": (1e-3, 100),
    "linear.weight_decays": (1e-12, 1),
    "linear.knn_temperature": (1e-4, 1e4),
    "contrastive.vicreg.*": (1e-6, 1e6),
    "contrastive.swav.epsilon": (1e-3, 1e3),
    "contrastive.refine.average": (1e-6, 1),
    "joint.mim_weight": (1e-9, 1e6),
    "graft.l1.weight": (1e-12, 1e6),
    "graft.lora.alpha": (1e-6, 1e6),
    "fewshot.c_*": (1e-12, 1e12),
    "propagation.c": (1e-12, 1e12),
    "propagation.gamma": (1e-3, 1e3),
    "finetune.*.mixup": (1e-3, 1e3),
    "finetune.*.cutmix": (1e-3, 1e3),
    "semi.weight": (1e-6, 1e6),
    "semi.unlabelled_ratio": (1, 1000),
    "data.eval_crop": (0.1, 1),
    "labels.subsets": (5, 1000),
    "run.threads": (1, 1024),
    "run.workers": (1, 1024),
    "run.processes": (1, 1024),
}
DISTINCT = (
    "data.source",
    "data.labels",
    "graft.policy",
    "linear.base_lrs",
    "linear.weight_decays",
    "fewshot.c_grid",
    "propagation.k",
    "propagation.alpha",
    "finetune.*.base_lr",
    "run.accept",
)


def faults(params: "Params") -> Iterator[str]:
    """Yield what makes no sense, each with its key, what is valid and what to do."""
    keys = dict(_leaves(params.model_dump(mode="json")))
    yield from _out_of_range(keys)
    yield from _repeated(keys)
    yield from _too_large(params)
    yield from _enlarged(params)
    yield from _nothing_left(params)
    yield from _nothing_trained(params)
    yield from _unfit_views(params)
    if not params.run.experiment.strip():
        yield "run.experiment is empty: give MLflow's experiment a name, such as lgp"


def truths_for_numbers(given: Any, taken: Any, key: str = "") -> Iterator[str]:
    """Yield the keys that were given true or false and take a number."""
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        yield key
    elif isinstance(given, dict) and isinstance(taken, dict):
        for name in given.keys() & taken.keys():
            yield from truths_for_numbers(given[name], taken[name], f"{key}.{name}".removeprefix("."))
    elif isinstance(given, list) and isinstance(taken, list | tuple):
        for place, (one, of_it) in enumerate(zip(given, taken, strict=False)):
            yield from truths_for_numbers(one, of_it, f"{key}.{place}")


def _leaves(values: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{section}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _out_of_range(keys: dict[str, Any]) -> Iterator[str]:
    for key, pattern in itertools.product(keys, RANGES):
        if not fnmatchcase(key, pattern):
            continue
        (low, high), given = RANGES[pattern], keys[key]
        for value in given if isinstance(given, list) else [given]:
            if value and not low <= value <= high:
                yield f"{key} {value:g} is not from {low:g} to {high:g}: choose a value of that range"


def _repeated(keys: dict[str, Any]) -> Iterator[str]:
    for key, given in keys.items():
        if isinstance(given, list) and any(fnmatchcase(key, pattern) for pattern in DISTINCT):
            twice = [value for place, value in enumerate(given) if value in given[:place]]
            if twice:
                yield f"{key} names {twice[0]} twice: each value once"


def _too_large(params: "Params") -> Iterator[str]:
    """Yield what no memory holds."""
    model, contrastive, mim = params.model, params.contrastive, params.mim
    hidden = max(contrastive.projector_hidden, contrastive.predictor_hidden, contrastive.projector_dim, model.width)
    sizes = {
        f"model.width {model.width} and model.depth {model.depth}": 12 * model.depth * model.width**2,
        f"contrastive.swav.prototypes {contrastive.swav.prototypes}": (
            contrastive.swav.prototypes * contrastive.projector_dim
        ),
        f"contrastive.refine.queue {contrastive.refine.queue}": contrastive.refine.queue * contrastive.projector_dim,
        f"contrastive.projector_hidden, projector_dim or predictor_hidden, {hidden},": hidden**2,
        f"mim.decoder_width {mim.decoder_width} and mim.decoder_depth {mim.decoder_depth}": (
            12 * mim.decoder_depth * mim.decoder_width**2
        ),
    }
    for name, size in sizes.items():
        if size > MAX_PARAMETERS:
            yield f"{name} give a model of more than {MAX_PARAMETERS:.0e} weights: lower them"


def _enlarged(params: "Params") -> Iterator[str]:
    """Yield a stored size that is below the size of training."""
    short_side = params.data.store_short_side
    if short_side is not None and short_side < params.data.image_size:
        yield (
            f"data.store_short_side {short_side} is below data.image_size {params.data.image_size}, so images would be "
            "enlarged: raise it, or set it to null"
        )


def _nothing_left(params: "Params") -> Iterator[str]:
    """Yield crops of less than a pixel, and masks of no patch."""
    size = params.data.image_size
    crops = {
        "mim.crop_scale_min": params.mim.crop_scale_min,
        "contrastive.views.crop_scale_min": params.contrastive.views.crop_scale_min,
        "linear.crop_scale_min": params.linear.crop_scale_min,
        **{f"finetune.{name}.crop_scale_min": recipe.crop_scale_min for name, recipe in params.finetune.items()},
    }
    if params.contrastive.small_views:
        crops["contrastive.small_views.crop_scale_min"] = params.contrastive.small_views.crop_scale_min
    smallest = 1 / size**2
    for key, share in crops.items():
        if share < smallest:
            yield (
                f"{key} {share:g} leaves less than one pixel of an image of {size}×{size}: "
                f"choose {smallest:.2g} or more"
            )
    patches = (size // params.model.patch_size) ** 2
    for section, ratio in (("mim", params.mim.mask_ratio), ("contrastive", params.contrastive.mask_ratio)):
        if ratio and int(patches * (1 - ratio)) == patches:
            yield f"{section}.mask_ratio {ratio:g} hides none of the {patches} patches: raise it to {1 / patches:.2g}"


def _unfit_views(params: "Params") -> Iterator[str]:
    """Yield small views that have no whole patches or are not small, and heads of blocks that are not there."""
    size, patch, depth = params.data.image_size, params.model.patch_size, params.model.depth
    small, heads = params.contrastive.small_views, params.contrastive.refine.heads
    fit = list(range(patch, size, patch))
    if small is not None and small.size not in fit:
        yield (
            f"contrastive.small_views.size {small.size} must be a multiple of model.patch_size {patch} below "
            f"data.image_size {size}: " + (f"choose one of {fit}" if fit else "set small_views to null")
        )
    if params.contrastive.objective == "refine" and heads > depth:
        yield f"contrastive.refine.heads {heads} is more than the {depth} blocks: lower it (one head: 1)"


def _nothing_trained(params: "Params") -> Iterator[str]:
    """Yield rates that train nothing, and weight decay that outweighs every gradient."""
    graft, objective = params.graft, params.contrastive
    groups = {"reverse.base_lrs": params.reverse.base_lrs if params.reverse else [1.0]}
    if graft.stage_lr and "stage_lr" in graft.policy:
        groups["graft.stage_lr.base_lrs"] = graft.stage_lr.base_lrs
    for key, rates in groups.items():
        if not any(rates):
            yield f"{key} are all 0, so nothing is trained: give one block or more a rate"
    decays = {f"finetune.{name}.layer_decay": recipe.layer_decay for name, recipe in params.finetune.items()}
    if params.semi:
        decays["semi.layer_decay"] = params.semi.layer_decay
    if graft.layer_decay and "layer_decay" in graft.policy:
        decays["graft.layer_decay.decay"] = graft.layer_decay.decay
    for key, decay in decays.items():
        if decay ** (params.model.depth + 1) < MIN_RATE:
            yield f"{key} {decay:g} leaves the lowest of {params.model.depth} blocks no rate: raise it (MAE: 0.75)"
    weights = objective.vicreg
    if objective.objective == "vicreg" and not (weights.invariance or weights.variance or weights.covariance):
        yield "contrastive.vicreg has the weight 0 for all terms, so nothing is trained: give one a weight"
    if objective.objective != "vicreg" and objective.projector_dim < 2:
        yield f"contrastive.projector_dim {objective.projector_dim} has no directions to compare: choose 2 or more"
    yield from _decayed_away(params)


def _decayed_away(params: "Params") -> Iterator[str]:
    """Yield trainings in which a step of AdamW shrinks the weights by all they are: peak rate × weight decay ≥ 1."""
    trainings: dict[str, TrainingParams | None] = {
        name: getattr(params, name) for name in ("mim", "cl", "graft", "joint", "reverse", "semi")
    }
    trainings |= {f"finetune.{name}": recipe for name, recipe in params.finetune.items()}
    for name, training in trainings.items():
        if training is None:
            continue
        peak = max(_rates(training), default=0.0) * training.batch_size / REFERENCE_BATCH
        if peak * training.weight_decay >= 1:
            yield (
                f"{name}.weight_decay {training.weight_decay:g} times the peak rate {peak:g} is 1 or more, so a step "
                "would remove all weights: lower weight_decay, the base rate or batch_size"
            )


def _rates(training: Any) -> list[float]:
    """Return the base learning rates of a training, with those of its policies."""
    sections = [training, *(getattr(training, name, None) for name in getattr(training, "policy", ()))]
    given = [getattr(section, name, None) for section in sections for name in ("base_lr", "base_lrs")]
    return [rate for value in given if value is not None for rate in (value if isinstance(value, list) else [value])]
