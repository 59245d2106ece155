"""Did it train? Whether the weights moved as their learning rates say, and whether the features collapsed."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lgp.errors import LgpError

BLOCK = re.compile(r"blocks\.(\d+)\.")
EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed")
# of the movement that a random walk with the same rates would make: below, the gradient did not arrive
MIN_MOVED = 0.01
# of features on the unit sphere: 1 where they spread evenly, 0 where all are the same
MIN_STD = 0.01
MIN_EFFECTIVE_RANK = 1.5

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """Copy all parameters, to compare with later; on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def group_of(name: str) -> str:
    """Name the group of a parameter: embed, block0 …, norm (all of the encoder), heads or momentum."""
    parts = name.split(".")
    if any(part.startswith("momentum_") for part in parts):
        return "momentum"
    if "encoder" not in parts:
        return "heads"
    inner = ".".join(parts[parts.index("encoder") + 1 :])
    block = BLOCK.match(inner)
    if block:
        return f"block{block.group(1)}"
    return "embed" if inner.startswith(EMBEDDINGS) else "norm"


def movement(
    model: nn.Module, initial: Weights, rates: Mapping[str, float], steps: int, held: frozenset[str] = frozenset()
) -> dict[str, float]:
    """Measure how far each group of parameters moved, as a share of the learning rates that it was given.

    The share is the root mean square of θ - θ_0 over the sum of the rates, peak · steps / 2 for a linear warm-up
    and half a cosine. AdamW moves a weight by about its rate a step: a share of 1 is a straight line, a random walk
    gives about 2 / √steps. The momentum encoder's is the plain root mean square.

    Args:
        model: after the training.
        initial: its weights before.
        rates: parameter name → peak learning rate.
        steps: of the training.
        held: parameters whose group need not move by its share, only at all.

    Returns:
        `moved/GROUP` → share.

    Raises:
        LgpError: a group with a rate did not move, or one that is frozen or without a rate did; names it.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    drifted, frozen_groups = [], set()
    for name, parameter in model.named_parameters():
        group, change = group_of(name), parameter.detach().cpu().double() - initial[name].double()
        summed_rate = 1.0 if group == "momentum" else rates[name] * steps / 2
        if group != "momentum" and (not parameter.requires_grad or not summed_rate):
            frozen_groups.add(group)
            if change.any():
                drifted.append(name)
        else:
            squares[group].append((change / summed_rate).square().flatten())
    moved = {group: math.sqrt(torch.cat(values).mean()) for group, values in squares.items()}
    least = MIN_MOVED * 2 / math.sqrt(steps)
    at_all = {"momentum", *(group_of(name) for name in held)}
    still = [g for g, share in moved.items() if share < least and (g not in at_all or not share)]
    if still or drifted:
        raise LgpError(
            "it did not train: "
            + "; ".join(
                [f"{g} moved by {moved[g]:.2g} of its learning rates, expected at least {least:.2g}" for g in still]
                + [f"{name} is frozen, but moved" for name in drifted]
            )
        )
    return {f"moved/{g}": float(f"{share:.4g}") for g, share in moved.items()} | {
        f"moved/{g}": 0.0 for g in frozen_groups - moved.keys()
    }


def spread(features: np.ndarray) -> dict[str, float]:
    """Measure how features (N, D) fill their space; constant features have collapsed.

    `features/std` is the mean deviation of the features on the unit sphere, times √D: 1 where they spread evenly
    (Chen and He 2021, section 4.1). `features/effective_rank` is exp of the entropy of the normalised singular values
    of the centred features (Roy and Vetterli 2007).

    Raises:
        LgpError: collapsed.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    std = float(unit.std(axis=0).mean() * math.sqrt(features.shape[1]))
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    share = singular / max(float(singular.sum()), 1e-12)
    rank = float(np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum()))
    if not std >= MIN_STD or not rank >= MIN_EFFECTIVE_RANK:
        raise LgpError(
            f"the features collapsed: deviation on the unit sphere {std:.3g} (alarm below {MIN_STD}), effective rank "
            f"{rank:.3g} (alarm below {MIN_EFFECTIVE_RANK}): lower the learning rate, or raise crop_scale_min"
        )
    return {"features/std": float(f"{std:.4g}"), "features/effective_rank": float(f"{rank:.4g}")}
