"""The cost of a pre-training before it starts: parameters, FLOPs, memory and hours.

The code that trains runs once on fake tensors, which have a shape but no data. Every figure follows from that code. The
model may be larger than the memory of this machine.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from lgp.compute.units import flop_text, time_text
from lgp.errors import LgpError
from lgp.models.contrastive import build_contrastive
from lgp.models.refine import Drawn
from lgp.models.vit import View, build_encoder
from lgp.params.arms import TRAINED
from lgp.params.file import Params
from lgp.params.pretrain import TrainingParams
from lgp.pretrain.graft import build_graft, graft_rates
from lgp.pretrain.mim import build_mae
from lgp.training.optimizer import REFERENCE_BATCH, parameter_groups

BATCH = 2  # images in the counted step: BatchNorm needs two, and all counts are proportional to it
GRADIENT_BYTES = 4 + 8  # per trained weight: its gradient, and AdamW's two moments
GIB = 2**30
PLAN_COLUMNS = ("stage", "parameters", "work per image", "steps", "memory per GPU", "time", "GPU time")
GRAFT_COLUMNS = ("part", "base lr", "decayed", "not decayed", "frozen")


@dataclass(frozen=True)
class Machine:
    """The machine to train on.

    Attributes:
        gpus: number of devices. Each takes an equal part of the batch.
        memory_gib: memory of one device, in GiB.
        tflops: speed of one device in training, in 10¹² FLOP/s: its peak times the fraction of it that is reached.
    """

    gpus: int
    memory_gib: float
    tflops: float


@dataclass(frozen=True)
class Cost:
    """The cost of a training step: parameters (all and trained), and per image FLOPs and bytes of kept activations."""

    parameters: int
    trained: int
    flops_per_image: float
    activation_bytes_per_image: float


@dataclass(frozen=True)
class StagePlan:
    """The cost of a stage on a machine."""

    stage: str
    cost: Cost
    steps: int
    memory_gib: float
    hours: float
    gpu_days: float
    warnings: list[str]


def measure(build: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]) -> Cost:
    """Count one step, forward and backward, in single precision.

    Args:
        build: returns a model, and the function of its loss on `BATCH` images. Its tensors have shapes but no data.
    """
    with torch.device("meta"):
        model, loss_of = build()
    kept: dict[int, torch.UntypedStorage] = {}
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        model.to_empty(device="cpu")
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        with counter:
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = loss_of()
            activations = sum(storage.nbytes() for storage in kept.values())
            loss.backward()
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Cost(parameters, trained, counter.get_total_flops() / BATCH, activations / BATCH)


def stage_model(stage: str, params: Params) -> tuple[nn.ModuleDict, Callable[[Tensor], Tensor]]:
    """Build what `mim`, `cl`, `graft`, `joint` or `reverse` trains, with random weights.

    Returns:
        The modules, and the function from images (B, C, S, S) to the stage's loss. Views and masks are not drawn: both
        views are the images, and any patches are masked.
    """
    encoder, parts, mask_ratio = (
        build_encoder(params.model, params.data),
        nn.ModuleDict(),
        params.contrastive.mask_ratio,
    )
    patches = encoder.patch_embed.num_patches
    if stage in ("cl", "joint"):
        parts["contrastive"] = build_contrastive(encoder, params.contrastive)
    if stage == "graft":
        parts["contrastive"] = build_graft(encoder, params)
    if stage in ("mim", "reverse", "joint"):
        parts["mae"] = build_mae(encoder, params.mim)

    def loss_of(images: Tensor) -> Tensor:
        losses, at = [], images.device
        if "contrastive" in parts:
            few = (len(images), int(patches * (1 - mask_ratio)))
            kept = torch.zeros(few, dtype=torch.int64, device=at) if mask_ratio else None
            views = View(images, kept), View(images, kept)
            drawn = Drawn(torch.zeros(len(images), dtype=torch.int64), torch.zeros(2, len(images)), 1)
            at_start = drawn if params.contrastive.objective == "refine" else 0.0
            losses.append(parts["contrastive"](*views, at_start, _small(images, params)))
        if "mae" in parts:
            losses.append(parts["mae"](images, torch.rand(len(images), patches, device=at)))
        return torch.stack(losses).sum()

    return parts, loss_of


def _small(images: Tensor, params: Params) -> Tensor | None:
    """Return images in the place of the small views, where there are some."""
    small = params.contrastive.small_views
    return None if small is None else images[None, :, :, : small.size, : small.size].expand(small.count, -1, -1, -1, -1)


def stage_cost(stage: str, params: Params, heads_only: bool = False) -> Cost:
    """Count a step of `mim`, `cl`, `graft`, `joint` or `reverse`; or of its head warm-up, with a frozen encoder."""
    size, channels = params.data.image_size, params.data.channels

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        parts, loss_of = stage_model(stage, params)
        for part in parts.values():
            if heads_only:
                part.encoder.requires_grad_(False)
        return parts, lambda: loss_of(torch.empty(BATCH, channels, size, size))

    return measure(build)


def plan_stage(stage: str, params: Params, images: int, machine: Machine) -> StagePlan:
    """Plan one stage.

    Args:
        stage: one of `arms.TRAINED`.
        params: the whole file.
        images: number of images in an epoch.
        machine: the machine to train on.
    """
    section: TrainingParams = getattr(params, stage)
    cost = stage_cost(stage, params)
    per_epoch = images // section.batch_size
    steps, head_steps = section.epochs * per_epoch, getattr(section, "head_warmup_epochs", 0) * per_epoch
    flops = cost.flops_per_image * steps
    if head_steps:
        flops += stage_cost(stage, params, heads_only=True).flops_per_image * head_steps
    per_gpu = -(-section.batch_size // machine.gpus)
    state = 4 * cost.parameters + GRADIENT_BYTES * cost.trained
    memory = (state + per_gpu * cost.activation_bytes_per_image) / GIB
    seconds = flops * section.batch_size / (machine.gpus * machine.tflops * 1e12)
    warnings = []
    if steps == 0:
        warnings.append(f"{stage}.batch_size {section.batch_size} is larger than the {images} images")
    if section.batch_size % machine.gpus:
        warnings.append(f"{stage}.batch_size {section.batch_size} does not divide among {machine.gpus} GPUs")
    if memory > machine.memory_gib:
        most = int((machine.memory_gib * GIB - state) / cost.activation_bytes_per_image)
        remedy = f"at most {most} images a GPU fit" if most > 0 else "the weights alone do not fit"
        warnings.append(
            f"{stage} needs {memory:.0f} GiB for {per_gpu} images a GPU, a GPU has {machine.memory_gib:g} GiB: {remedy}"
        )
    return StagePlan(stage, cost, steps + head_steps, memory, seconds / 3600, seconds * machine.gpus / 86400, warnings)


def plan(params: Params, images: int, machine: Machine) -> list[StagePlan]:
    """Plan the pre-training of every arm in `arms` that is trained.

    Raises:
        LgpError: no arm in `arms` is trained.
    """
    stages = [stage for stage in TRAINED if stage in params.arms]
    if not stages:
        raise LgpError(f"arms lists {', '.join(params.arms)}, and none of {', '.join(TRAINED)}: nothing to plan")
    return [plan_stage(stage, params, images, machine) for stage in stages]


@dataclass(frozen=True)
class PartRates:
    """A part of the grafted model: its peak learning rate, and its numbers of weights with and without weight decay.

    `base_lr` is per 256 images, as papers give it. `frozen` counts weights that the optimizer does not train.
    """

    part: str
    base_lr: float
    decayed: int
    undecayed: int
    frozen: int


def graft_rates_by_part(params: Params) -> list[PartRates]:
    """List the graft's parameter groups by part of the model: embed, block0 …, norm, heads."""
    with torch.device("meta"):
        model = build_graft(build_encoder(params.model, params.data), params)
    rates = graft_rates(model, params.graft, params.model.depth)
    groups = parameter_groups(model, rates, params.graft.weight_decay)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    parts: dict[tuple[str, float], list[int]] = {}
    roles = model.roles()
    for name, parameter in model.named_parameters():
        if not roles[name].follows:
            counts = parts.setdefault((roles[name].part, rates[name]), [0, 0, 0])
            kind = 2 if id(parameter) not in decay_of else int(not decay_of[id(parameter)])
            counts[kind] += parameter.numel()
    scale = params.graft.batch_size / REFERENCE_BATCH
    return [PartRates(part, rate / scale, *counts) for (part, rate), counts in parts.items()]


def matrix_tflops(
    device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None, seconds: float = 1.0
) -> float:
    """Measure the speed of matrix products of `dtype` on a device, in 10¹² FLOP/s.

    Without a `size` the products are 8192 wide on CUDA, where those of 2048 take as long as a wait for them.
    """
    size = size or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(size, size, device=device).to(dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    a @ a
    wait()
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        wait()
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - started) / 1e12


def plan_row(plan: StagePlan) -> list[str]:
    """Write a plan as the cells of `PLAN_COLUMNS`, in readable units."""
    return [
        plan.stage,
        f"{plan.cost.parameters / 1e6:,.2f} M",
        flop_text(plan.cost.flops_per_image),
        f"{plan.steps:,}",
        f"{plan.memory_gib:,.3g} GiB",
        time_text(plan.hours),
        time_text(24 * plan.gpu_days),
    ]


def graft_rows(params: Params) -> list[list[str]]:
    """Write the graft's parameter groups as the cells of `GRAFT_COLUMNS`."""
    groups = graft_rates_by_part(params)
    return [[g.part, f"{g.base_lr:.4g}", f"{g.decayed:,}", f"{g.undecayed:,}", f"{g.frozen:,}"] for g in groups]
