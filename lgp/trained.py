"""Did it train? Whether the weights moved as their learning rates say, and whether the features collapsed."""

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lgp.errors import LgpError
from lgp.models.vit import EMBEDDINGS, block_of

# of the movement that a random walk with the same rates would make
MIN_MOVED = 0.01
# of features on the unit sphere: 1 where they spread evenly, 0 where all are the same
MIN_STD = 0.01
MIN_EFFECTIVE_RANK = 1.5

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """Copy all parameters, to compare with later; on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def group_of(name: str) -> str:
    """Name the group of a parameter: embed, block0 …, norm (all of the encoder), heads, or a momentum copy's module."""
    parts = name.split(".")
    copies = [part for part in parts if part.startswith("momentum_")]
    if copies:
        return copies[0]
    if "encoder" not in parts:
        return "heads"
    inner = ".".join(parts[parts.index("encoder") + 1 :])
    block = block_of(inner)
    if block is not None:
        return f"block{block}"
    return "embed" if inner.startswith(EMBEDDINGS) else "norm"


def movement(
    model: nn.Module,
    initial: Weights,
    rates: Mapping[str, float],
    steps: int,
    optimizer: Optimizer,
    held: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Measure how far each group of parameters moved, as a share of the learning rates that it was given.

    The share is the root mean square of θ - θ_0 over the sum of the rates, peak · steps / 2 for a linear warm-up
    and half a cosine. AdamW moves a weight by about its rate a step: a share of 1 is a straight line, a random walk
    gives about 2 / √steps. Weight decay moves weights too, so the optimizer must have seen a gradient as well. The
    momentum copies' is the plain root mean square.

    Args:
        model: after the training.
        initial: its weights before.
        rates: parameter name → peak learning rate.
        steps: of the training.
        optimizer: AdamW, after the training.
        held: parameters whose group need not move by its share, only at all.

    Returns:
        `moved/GROUP` → share.

    Raises:
        LgpError: a group with a rate got no gradient or did not move, a momentum copy did not follow, or something that
            is frozen or without a rate moved; names it.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    faults, frozen_groups, reached = [], set(), set()
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        group, change = group_of(name), parameter.detach().cpu().double() - initial[name].double()
        learner = name.replace("momentum_", "")  # what a momentum copy follows; else the parameter itself
        if not parameters[learner].requires_grad or not rates[learner]:
            frozen_groups.add(group)
            if change.any():
                faults.append(f"{name} is frozen, but moved")
            continue
        squares[group].append((change / (1.0 if learner != name else rates[name] * steps / 2)).square().flatten())
        if learner != name or _saw_gradient(optimizer, parameter):
            reached.add(group)
    moved = {group: math.sqrt(torch.cat(values).mean()) for group, values in squares.items()}
    least = MIN_MOVED * 2 / math.sqrt(steps)
    loose = {group_of(name) for name in held} | {g for g in moved if g.startswith("momentum_")}
    for group, share in moved.items():
        if group not in reached:
            faults.append(f"no gradient reached {group}")
        elif share < least and group not in loose:
            faults.append(f"{group} moved by {share:.2g} of its learning rates, expected at least {least:.2g}")
        # a momentum copy follows from the step after the first with a learning rate
        elif not share and (steps > 2 or not group.startswith("momentum_")):
            faults.append(f"{group} did not move")
    if faults:
        raise LgpError(f"it did not train: {'; '.join(faults[:6])}")
    shares = {f"moved/{group}": float(f"{share:.4g}") for group, share in moved.items()}
    return shares | {f"moved/{group}": 0.0 for group in frozen_groups - moved.keys()}


def _saw_gradient(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    second_moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
    return second_moment is not None and bool(second_moment.any())


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
