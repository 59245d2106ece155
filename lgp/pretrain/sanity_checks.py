"""Sanity checks of a training: every part has moved, the loss has not risen, the features have not collapsed."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lgp.features.rank import effective_rank
from lgp.models.roles import PretrainingModel

# smallest distance of a part, relative to a random walk with the same learning rates
MIN_MOVED = 0.01
# smallest usual `features/std`: 1 is a uniform distribution on the unit sphere, 0 are constant features
LOW_STD = 0.01
# features that deviate less are constant: rounding errors then make a good part of their effective rank
MIN_STD = 1e-4
MIN_EFFECTIVE_RANK = 1.5
# largest mean loss of an epoch, relative to the loss of the first step, before any weight moved
MAX_RISE = 2.0
# smallest usual fall of the loss from the first step and epoch to the last epoch, as a share
LOW_FALL = 0.01

# what to do about a fault
GO_FURTHER = "raise the learning rate or the epochs"
HOLD_LESS = "lower the learning rate or the weight decay"  # weight decay bounds the weights, whatever the rate
CALM_DOWN = "lower the learning rate, or raise crop_scale_min"
SLOW_DOWN = "lower the learning rate, lengthen its warm-up or set clip_norm"
SHORT = "too few epochs, or a learning rate that is too low or too high"  # which, no measure here tells
REPORT = "this is a mistake in the code of the objective, report it"

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Findings:
    """The findings of checks. `|` joins two.

    Attributes:
        metrics: name → measure.
        faults: what failed → what to do. A model with a fault counts as not trained.
        warnings: what is unusual, and why.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """What failed, at most six faults, and what to do, as text."""
        return f"{'; '.join(list(self.faults)[:6])}: {', or '.join(dict.fromkeys(self.faults.values()))}"

    def __or__(self, other: "Findings") -> "Findings":
        """Return the findings of both."""
        return Findings(
            {**self.metrics, **other.metrics}, {**self.faults, **other.faults}, self.warnings + other.warnings
        )


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
) -> Findings:
    """Measure how far each part of a model moved, relative to its learning rates.

    The measure is the root mean square of (θ - θ_0) / sum of the learning rates. The sum is peak · steps / 2 for a
    linear warm-up and half a cosine. AdamW moves a weight by about its learning rate in a step. A straight line thus
    gives 1, and a random walk about 2 / √steps. Weight decay moves weights too, so a part must also have received a
    gradient. A momentum copy has no learning rate: its measure is the root mean square of θ - θ_0.

    The checks hold at any step after the warm-up. The sum so far is then peak · steps / 2 or more, so the measure is
    never too small.

    Args:
        model: after `steps` steps.
        initial: its weights before.
        rates: parameter name → peak learning rate.
        steps: done so far.
        optimizer: AdamW, after `steps` steps.
        regularized: parameters whose parts may move by any distance above 0.

    Returns:
        `moved/PART` → the measure; 0 for a frozen part. Faults are: a part with a learning rate got no gradient or
        did not move, a momentum copy did not follow, or a parameter moved that is frozen or has no learning rate.
    """
    squares: dict[str, list[Tensor]] = defaultdict(list)
    faults: dict[str, str] = {}
    frozen, with_gradient = set(), set()
    roles, parameters = model.roles(), dict(model.named_parameters())
    for name, parameter in parameters.items():
        role, change = roles[name], parameter.detach().cpu().double() - initial[name].double()
        learner = role.follows or name
        if not parameters[learner].requires_grad or not rates[learner]:
            frozen.add(role.part)
            if change.any():
                faults[f"{name} is frozen, but moved"] = REPORT
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
            faults[f"no gradient reached {part}"] = REPORT
        elif share < least and part not in exempt:
            faults[f"{part} moved by {share:.2g} of its learning rates, expected at least {least:.2g}"] = HOLD_LESS
        # a momentum copy moves one step later than the encoder, which first moves with a learning rate above 0
        elif not share and (steps > 2 or part not in copies):
            faults[f"{part} did not move"] = GO_FURTHER
    shares = {f"moved/{part}": float(f"{share:.4g}") for part, share in moved.items()}
    return Findings(shares | {f"moved/{part}": 0.0 for part in frozen - moved.keys()}, faults)


def _saw_gradient(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    second_moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
    return second_moment is not None and bool(second_moment.any())


def check_loss(first_step: float, epochs: Sequence[float]) -> Findings:
    """Compare the mean loss of the last epoch with the losses of the beginning. No loss may be negative.

    Args:
        first_step: the loss of the first step, before any weight moved.
        epochs: the mean loss of each epoch.

    Returns:
        A loss that has risen is a fault, also where it is finite. A loss that hardly fell is a warning.
    """
    first, last = min(first_step, epochs[0]), epochs[-1]
    if last > MAX_RISE * first_step:
        return Findings({}, {f"the loss rose from {first_step:.4g} at the first step to {last:.4g}": SLOW_DOWN})
    if len(epochs) == 1 or last <= (1 - LOW_FALL) * first:
        return Findings()
    how = "did not fall" if last >= first else "hardly fell"
    means = f"{first:.4g} at the beginning, {last:.4g} on average over the last epoch"
    return Findings(warnings=(f"{SHORT}: the loss {how}: {means}",))


def check_features(features: np.ndarray) -> Findings:
    """Measure the standard deviation and the effective rank of features (N, D).

    `features/std` is the mean standard deviation of the features on the unit sphere, times √D. It is 1 for a uniform
    distribution (Chen and He 2021, section 4.1). `features/effective_rank` is `effective_rank`.

    Returns:
        Both measures. Features that are constant or lie on one line have collapsed, which is a fault. Features that
        deviate little in many directions are a warning.
    """
    if not np.isfinite(features).all():
        return Findings({"features/std": 0.0, "features/effective_rank": 0.0}, {"a feature is not finite": CALM_DOWN})
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    std = float(unit.std(axis=0).mean() * math.sqrt(features.shape[1]))
    rank = effective_rank(features)
    failed = [f"effective rank {rank:.3g} (alarm below {MIN_EFFECTIVE_RANK})"] if rank < MIN_EFFECTIVE_RANK else []
    failed += [f"deviation on the unit sphere {std:.3g} (alarm below {MIN_STD})"] if std < MIN_STD else []
    short = (
        f"{SHORT}: the features deviate by {std:.3g} on the unit sphere (usual: {LOW_STD} or more), at an effective "
        f"rank of {rank:.3g}"
    )
    return Findings(
        {"features/std": float(f"{std:.4g}"), "features/effective_rank": float(f"{rank:.4g}")},
        {f"the features collapsed: {', '.join(failed)}": CALM_DOWN} if failed else {},
        (short,) if std < LOW_STD and not failed else (),
    )
