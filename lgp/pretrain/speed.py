"""The measured speed of a training on this machine, before it starts."""

import time
from contextlib import nullcontext

import torch

from lgp.compute.device import choose_device
from lgp.compute.precision import choose_precision, place
from lgp.params.file import Params
from lgp.pretrain.plan import stage_model
from lgp.training.optimizer import adamw

SECONDS = 1.5
BETAS = (0.9, 0.999)
RATE = 1e-4


def images_per_second(params: Params, stage: str, seconds: float = SECONDS) -> float:
    """Measure real steps of `mim`, `cl` or `graft`: forward, backward, AdamW; on random tensors of the stage's batch.

    Device, precision and threads are those of `run`. Reading images and drawing views is not in it.

    Args:
        params: the whole file.
        stage: what to train.
        seconds: to measure, after a first step. At least one step is measured.
    """
    device = choose_device(params.run)
    precision = choose_precision(params.run, device, params.model.width)
    model, loss_of = stage_model(stage, params)
    place(model, device, precision)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw([{"params": weights, "lr": RATE, "weight_decay": 0.0}], BETAS)
    batch, size = getattr(params, stage).batch_size, params.data.image_size
    images = torch.randn(batch, params.data.channels, size, size, device=device)
    mixed = precision != torch.float32

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, precision) if mixed else nullcontext():
            loss = loss_of(images)
        loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < seconds:
        step()
        steps += 1
    return float(batch * steps / (time.perf_counter() - started))
