"""The linear probe: many linear heads on the same frozen features. Validation chooses one of them.

The protocol is the paper's (LGP, section 4; released code): SGD without momentum, half a cosine over 90 epochs, and a
head for each of 35 learning rates and 2 weight decays. There are two deviations. The released code trains 70 heads side
by side; here all heads are one matrix product. The paper reports the head that is best *on test*; here it is the head
that is best on val.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lgp.compute.precision import in_single_precision
from lgp.compute.randomness import generator
from lgp.params.evaluate import LinearParams
from lgp.training.optimizer import peak_rate, warmup_cosine

SCORED_ROWS = 1024  # scored at once


class _SoftmaxCrossEntropy(torch.autograd.Function):
    """Cross-entropy (B, H) over the classes of logits (B, C, H). The gradient is probabilities minus one-hot labels.

    torch's own cross-entropy takes twice the time for many heads: it keeps and reads several arrays of this size.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        probabilities = logits.softmax(1)
        ctx.save_for_backward(probabilities, labels)
        rows = torch.arange(len(labels), device=labels.device)
        return -probabilities[rows, labels].clamp(min=torch.finfo(logits.dtype).tiny).log()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        of_logits, labels = ctx.saved_tensors  # type: ignore[attr-defined]
        # in place: the array is large, and backward runs only once
        of_logits[torch.arange(len(labels), device=labels.device), labels] -= 1
        return of_logits.mul_(gradient[:, None]), None


@in_single_precision
def cross_entropy_of_heads(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute each head's mean cross-entropy, (H,), of logits (B, C, H) and labels (B,)."""
    losses: Tensor = _SoftmaxCrossEntropy.apply(logits, labels)
    return losses.mean(0)


class LinearHeads(nn.Module):
    """H linear heads on the same features, as one product (B, D) · (D, C·H).

    One SGD optimizer with the highest learning rate trains all heads. The loss of a head, weight decay included, is
    scaled by its own rate divided by the highest rate. SGD's step is linear in the gradient, so each head trains as
    with its own SGD. All heads start from the same draw of N(0, 0.01²).
    """

    rate_ratio: Tensor
    decay_ratio: Tensor

    def __init__(
        self,
        width: int,
        classes: int,
        settings: Sequence[tuple[float, float]],
        batch_norm: bool,
        rng: torch.Generator,
    ) -> None:
        """Make a head for each (learning rate, weight decay).

        `batch_norm` puts BatchNorm without affine parameters before the heads (MAE, appendix A.1).
        """
        super().__init__()
        self.classes, self.settings = classes, list(settings)
        rates, decays = (torch.tensor(values, dtype=torch.float64) for values in zip(*settings, strict=True))
        self.rate = float(rates.max())
        self.register_buffer("rate_ratio", rates / self.rate)
        self.register_buffer("decay_ratio", rates / self.rate * decays / 2)
        self.decayed = bool(decays.any())
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        start = 0.01 * torch.randn(width, classes, generator=rng)
        # the heads are the last axis: the softmax over the classes then works on whole rows of memory
        self.weight = nn.Parameter(start[:, :, None].repeat(1, 1, len(settings)).flatten(1))
        self.bias = nn.Parameter(torch.zeros(classes * len(settings)))

    def forward(self, features: Tensor) -> Tensor:
        """Turn features (B, D) into logits (B, C, H)."""
        return torch.addmm(self.bias, self.norm(features), self.weight).unflatten(1, (self.classes, -1))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the heads' losses, to be trained by SGD with the rate `self.rate`."""
        losses = cross_entropy_of_heads(self(features), labels)
        # products, not `@`: mixed precision would round the rates to bf16
        loss = (losses * self.rate_ratio.to(losses.dtype)).sum()
        if self.decayed:
            for weights in (self.weight, self.bias):
                squares = weights.view(-1, len(self.settings)).square()
                loss = loss + (squares * self.decay_ratio.to(weights.dtype)).sum()
        return loss

    def optimizer(self) -> SGD:
        """Return the optimizer that trains all heads."""
        return SGD(self.parameters(), lr=self.rate)

    @torch.inference_mode()
    def logits(self, features: np.ndarray, heads: slice | int = slice(None)) -> Tensor:
        """Return logits (N, C, H), or (N, C) of one head, on the CPU. Features (N, D) may be memory-mapped."""
        self.eval()
        starts = range(0, len(features), SCORED_ROWS)
        return torch.cat([self(self.rows(features[s : s + SCORED_ROWS]))[..., heads].cpu() for s in starts])

    def rows(self, features: np.ndarray) -> Tensor:
        """Move features to the device and data type of the heads."""
        return torch.from_numpy(np.ascontiguousarray(features)).to(self.weight.device, self.weight.dtype)

    def head(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return one head as weight (C, D) and bias (C,) on features that BatchNorm does not normalise, float64."""
        of_all = self.weight.detach().cpu().double().unflatten(1, (self.classes, -1))
        weight, bias = of_all[..., number].T, self.bias.detach().cpu().double().view(self.classes, -1)[:, number]
        if isinstance(self.norm, nn.BatchNorm1d):
            assert self.norm.running_mean is not None
            assert self.norm.running_var is not None
            weight = weight / (self.norm.running_var.cpu().double() + self.norm.eps).sqrt()
            bias = bias - weight @ self.norm.running_mean.cpu().double()
        return weight.numpy(), bias.numpy()

    @torch.inference_mode()
    def scores(self, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return each head's accuracy, (H,) in [0, 1], and Brier score, (H,) in [0, 2].

        A head whose weights are not finite has the accuracy -1 and the score 2.
        """
        self.eval()
        correct = torch.zeros(len(self.settings), dtype=torch.int64)
        squares = torch.zeros(len(self.settings), dtype=torch.float64)
        for start in range(0, len(features), SCORED_ROWS):
            of_rows = torch.from_numpy(labels[start : start + SCORED_ROWS])
            probabilities = self(self.rows(features[start : start + SCORED_ROWS])).double().softmax(1).cpu()
            correct += (probabilities.argmax(1) == of_rows[:, None]).sum(0)
            one_hot = nn.functional.one_hot(of_rows, self.classes)[:, :, None]
            squares += (probabilities - one_hot).square().sum(dim=(0, 1))
        finite = self.weight.unflatten(1, (self.classes, -1)).isfinite().all(dim=(0, 1)).cpu().numpy()
        accuracies, briers = (total.numpy() / max(len(features), 1) for total in (correct, squares))
        return np.where(finite, accuracies, -1.0), np.where(finite, briers, 2.0)


def head_settings(params: LinearParams, batch_size: int) -> list[tuple[float, float]]:
    """Return the (learning rate, weight decay) of each head. The rates in the parameters are per 256 images."""
    rates = [peak_rate(rate, batch_size) for rate in params.base_lrs]
    return list(itertools.product(rates, params.weight_decays))


def train_heads(
    heads: LinearHeads,
    features: np.ndarray,
    labels: np.ndarray,
    epochs: int,
    batch_size: int,
    seed: int,
    precision: torch.dtype = torch.float32,
) -> None:
    """Train all heads on cached features.

    Args:
        heads: on the device to train on.
        features: (N, D). They may be memory-mapped: each step reads only its own rows.
        labels: (N,).
        epochs: number of passes. Each has its own random order and leaves out its incomplete last batch.
        batch_size: at most N.
        seed: of the random orders.
        precision: of the matrix products.
    """
    steps_per_epoch = len(features) // batch_size
    optimizer = heads.optimizer()
    schedule = warmup_cosine(optimizer, epochs * steps_per_epoch, 0)
    mixed = torch.autocast(heads.weight.device.type, precision, enabled=precision != torch.float32)
    targets = torch.from_numpy(labels)
    heads.train()
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=generator(seed, "linear/order", epoch))
        for step in range(steps_per_epoch):
            rows = order[step * batch_size : (step + 1) * batch_size]
            schedule.step_update(epoch * steps_per_epoch + step)
            optimizer.zero_grad()
            with mixed:
                loss = heads.loss(heads.rows(features[rows.numpy()]), targets[rows].to(heads.weight.device))
            loss.backward()
            optimizer.step()


@dataclass(frozen=True)
class Chosen:
    """The head that validation chose.

    Attributes:
        head: its number.
        base_lr: its learning rate per 256 images.
        weight_decay: its weight decay.
        val: its accuracy on val, in [0, 1].
    """

    head: int
    base_lr: float
    weight_decay: float
    val: float


def choose_head(heads: LinearHeads, params: LinearParams, x_val: np.ndarray, y_val: np.ndarray) -> Chosen:
    """Return the head with the best accuracy on val, of equal ones that with the lowest Brier score there.

    The heads with the lowest rates hardly leave their start. Where val has few images they can be right on all of them,
    but their probabilities are near 1 / C.
    """
    accuracies, briers = heads.scores(x_val, y_val)
    best = int(np.lexsort((briers, -accuracies))[0])
    base_lr, weight_decay = list(itertools.product(params.base_lrs, params.weight_decays))[best]
    return Chosen(best, base_lr, weight_decay, float(accuracies[best]))
