"""Exponential averages of a module's weights: momentum copies and teachers."""

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def follow(copy: nn.Module, learner: nn.Module, decay: float) -> None:
    """Move each parameter of a copy towards that of the learner: copy ← decay · copy + (1 - decay) · learner.

    Args:
        copy: of the same parameters as the learner, in the same order.
        learner: stays as it is.
        decay: in [0, 1].
    """
    of_copy, of_learner = ([p.detach() for p in module.parameters()] for module in (copy, learner))
    get_ema_multi_avg_fn(decay)(of_copy, of_learner, 0)


def decay_over(share: float, steps: int) -> float:
    """Return the decay of an average over about `share` of the steps: 1 - 1 / (share · steps), at least 0."""
    return 1 - 1 / max(share * steps, 1)
