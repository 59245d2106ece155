"""Parameter groups and the schedule. AdamW is torch's, the schedule is timm's."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer

REFERENCE_BATCH = 256


def peak_rate(base_lr: float, batch_size: int) -> float:
    """Scale a base learning rate linearly: lr = base_lr × batch / 256 (Goyal et al. 2017)."""
    return base_lr * batch_size / REFERENCE_BATCH


def parameter_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate and weight decay. Each is in exactly one group.

    Parameters of one dimension (biases, norms) are not decayed, as in MAE and LGP. The class and mask tokens are
    decayed. MoCo v3's released code decays all parameters. Here the baseline follows the graft's rule: both are to
    differ only in their starting weights.

    Args:
        model: the model with these parameters.
        rates: parameter name → learning rate.
        weight_decay: weight decay of parameters of two or more dimensions.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[rates[name], 0.0 if parameter.ndim <= 1 else weight_decay].append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> AdamW:
    """Return AdamW for parameter groups, fused into one kernel per group."""
    return AdamW(groups, betas=betas, fused=True)


def whole_warmup_steps(warmup_epochs: float, steps_per_epoch: int, steps: int) -> int:
    """Round a warm-up in epochs to whole steps; at least one of all `steps` comes after it."""
    return min(round(warmup_epochs * steps_per_epoch), steps - 1)


def warmup_cosine(optimizer: Optimizer, steps: int, warmup_steps: int) -> CosineLRScheduler:
    """Schedule each group's rate per step: linear from 0 over the warm-up, then half a cosine to 0.

    The rate is a pure function of the step (`step_update(step)`). There is no state to save.
    """
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup_steps,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
