"""Sanity checks after a training: every part of the model has moved, and the features have not collapsed."""

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lgp.errors import LgpError
from lgp.models.roles import PretrainingModel

# smallest distance of a part, relative to a random walk with the same learning rates
MIN_MOVED = 0.01
# smallest `features/std`: 1 is a uniform distribution on the unit sphere, 0 are constant features
MIN_STD = 0.01
MIN_EFFECTIVE_RANK = 1.5

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """Copy all parameters to the CPU, for a later comparison."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def check_weights(
    model: PretrainingModel,
    initial: Weights,
    rates: Mapping[str, float],
    steps: int,
    optimizer: Optimizer,
    regularized: frozenset[str] = frozenset(),
) -> dict[str, float]:
    """Measure how far each part of a model moved, relative to its learning rates.

    The measure is the root mean square of (θ - θ_0) / sum of the learning rates. The sum is peak · steps / 2 for a
    linear warm-up and half a cosine. AdamW moves a weight by about its learning rate in a step. A straight line thus
    gives 1, and a random walk about 2 / √steps. Weight decay moves weights too, so a part must also have received a
    gradient. A momentum copy has no learning rate: its measure is the root mean square of θ - θ_0.

    Args:
        model: after the training.
        initial: its weights before.
        rates: parameter name → peak learning rate.
        steps: of the training.
        optimizer: AdamW, after the training.
        regularized: parameters whose parts may move by any distance above 0.

    Returns:
        `moved/PART` → the measure; 0 for a frozen part.

    Raises:
        LgpError: a part with a learning rate got no gradient or did not move, a momentum copy did not follow, or a
            parameter moved that is frozen or has no learning rate. The message names them.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    faults, frozen, with_gradient = [], set(), set()
    roles, parameters = model.roles(), dict(model.named_parameters())
    for name, parameter in parameters.items():
        role, change = roles[name], parameter.detach().cpu().double() - initial[name].double()
        learner = role.follows or name
        if not parameters[learner].requires_grad or not rates[learner]:
            frozen.add(role.part)
            if change.any():
                faults.append(f"{name} is frozen, but moved")
            continue
        squares[role.part].append((change / (1.0 if role.follows else rates[name] * steps / 2)).square().flatten())
        if role.follows or _saw_gradient(optimizer, parameter):
            with_gradient.add(role.part)
    moved = {part: math.sqrt(torch.cat(values).mean()) for part, values in squares.items()}
    least = MIN_MOVED * 2 / math.sqrt(steps)
    copies = {role.part for role in roles.values() if role.follows}
    exempt = {roles[name].part for name in regularized} | copies
    for part, share in moved.items():
        if part not in with_gradient:
            faults.append(f"no gradient reached {part}")
        elif share < least and part not in exempt:
            faults.append(f"{part} moved by {share:.2g} of its learning rates, expected at least {least:.2g}")
        # a momentum copy moves one step later than the encoder, which first moves with a learning rate above 0
        elif not share and (steps > 2 or part not in copies):
            faults.append(f"{part} did not move")
    if faults:
        raise LgpError(f"the model did not train: {'; '.join(faults[:6])}")
    shares = {f"moved/{part}": float(f"{share:.4g}") for part, share in moved.items()}
    return shares | {f"moved/{part}": 0.0 for part in frozen - moved.keys()}


def _saw_gradient(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    second_moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
    return second_moment is not None and bool(second_moment.any())


def check_features(features: np.ndarray) -> dict[str, float]:
    """Measure the standard deviation and the effective rank of features (N, D). Constant features have collapsed.

    `features/std` is the mean standard deviation of the features on the unit sphere, times √D. It is 1 for a uniform
    distribution (Chen and He 2021, section 4.1). `features/effective_rank` is exp of the entropy of the normalised
    singular values of the centred features (Roy and Vetterli 2007).

    Raises:
        LgpError: the features have collapsed.
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
