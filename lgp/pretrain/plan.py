"""The cost of a pre-training before it starts: parameters, FLOPs, memory and hours. It follows from counted steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lgp.compute.units import flop_text, time_text
from lgp.errors import LgpError
from lgp.models.contrastive import build_contrastive
from lgp.models.in_parts import mean_in_parts
from lgp.models.refine import Drawn
from lgp.models.vit import View, build_encoder
from lgp.params.arms import OF_SINGLE_IMAGES, TRAINED
from lgp.params.file import Params
from lgp.params.pretrain import TrainingParams
from lgp.params.run import RunParams
from lgp.pretrain.counted_step import BATCH, Cost, Memory, measure, measure_memory
from lgp.pretrain.graft import build_graft, graft_rates
from lgp.pretrain.mim import build_mae
from lgp.training.optimizer import REFERENCE_BATCH, parameter_groups

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
class Saving:
    """How a stage saves memory.

    Attributes:
        parts: of a batch, `run.accumulate`.
        checkpointed: whether its blocks are, `run.grad_checkpointing`.
    """

    parts: int = 1
    checkpointed: bool = False

    @classmethod
    def of(cls, stage: str, run: RunParams) -> "Saving":
        """Return what `run` says of a stage."""
        return cls(run.accumulate.get(stage, 1), stage in run.grad_checkpointing)

    def keys(self, stage: str) -> str:
        """Write the keys of `run` that a stage needs, as text for a message."""
        keys = [f"run.accumulate: {{{stage}: {self.parts}}}"] if self.parts > 1 else []
        return " with ".join(keys + [f"run.grad_checkpointing: [{stage}]"] * self.checkpointed)


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


def stage_model(
    stage: str, params: Params, images: int | None = None, saving: Saving = Saving()
) -> tuple[nn.ModuleDict, Callable[[Tensor], Tensor]]:
    """Build what `mim`, `cl`, `graft`, `joint` or `reverse` trains, with random weights.

    Args:
        stage: what is trained.
        params: the whole file.
        images: number of training images, which bounds the queue of `refine`; None: any.
        saving: how it saves memory. A loss of single images is computed at once: the step sums parts of it.

    Returns:
        The modules, and the function from images (B, C, S, S) to the stage's loss. Views and masks are not drawn: both
        views have the images' shape, and any patches are masked.
    """
    encoder, parts, mask_ratio = (
        build_encoder(params.model, params.data),
        nn.ModuleDict(),
        params.contrastive.mask_ratio,
    )
    patches = encoder.patch_embed.num_patches
    if stage in ("cl", "joint"):
        parts["contrastive"] = build_contrastive(encoder, params.contrastive, images)
    if stage == "graft":
        parts["contrastive"] = build_graft(encoder, params, images)
    if stage in ("mim", "reverse", "joint"):
        parts["mae"] = build_mae(encoder, params.mim)
    if "contrastive" in parts:
        parts["contrastive"].parts = saving.parts  # type: ignore[assignment]
    encoder.set_grad_checkpointing(saving.checkpointed)
    of_mae = saving.parts if "contrastive" in parts else 1

    def masked(images: Tensor) -> Tensor:
        return parts["mae"](images, torch.rand(len(images), patches, device=images.device))

    def loss_of(images: Tensor) -> Tensor:
        losses, at = [], images.device
        if "contrastive" in parts:
            few = (len(images), int(patches * (1 - mask_ratio)))
            kept = torch.zeros(few, dtype=torch.int64, device=at) if mask_ratio else None
            views = View(images, kept), View(images.clone(), kept)
            drawn = Drawn(torch.zeros(len(images), dtype=torch.int64), torch.zeros(2, len(images)), 1)
            at_start = drawn if params.contrastive.objective == "refine" else 0.0
            losses.append(parts["contrastive"](*views, at_start, _small(images, params)))
        if "mae" in parts:
            losses.append(mean_in_parts(masked, images.chunk(of_mae)))
        return torch.stack(losses).sum()

    return parts, loss_of


def _small(images: Tensor, params: Params) -> Tensor | None:
    """Return images in the place of the small views, where there are some."""
    small = params.contrastive.small_views
    return None if small is None else images[None, :, :, : small.size, : small.size].expand(small.count, -1, -1, -1, -1)


def stage_cost(
    stage: str, params: Params, heads_only: bool = False, images: int | None = None, saving: Saving = Saving()
) -> Cost:
    """Count a step of `mim`, `cl`, `graft`, `joint` or `reverse`; or of its head warm-up, with a frozen encoder."""
    size, channels = params.data.image_size, params.data.channels
    # how many parts it are does not matter: each image passes the encoder once more
    of_two = replace(saving, parts=min(saving.parts, BATCH))

    def build() -> tuple[nn.Module, Callable[[], Tensor]]:
        parts, loss_of = stage_model(stage, params, images, of_two)
        for part in parts.values():
            if heads_only:
                part.encoder.requires_grad_(False)
        return parts, lambda: loss_of(torch.empty(BATCH, channels, size, size))

    return measure(build)


@dataclass(frozen=True)
class Step:
    """A step of a stage on one device. `batch` is the device's part of the batch, `images` the number of all images."""

    stage: str
    params: Params
    images: int
    batch: int

    def memory(self, saving: Saving) -> Memory:
        """Return the memory of the step."""
        return self._counted(saving) if saving.parts == 1 else self.in_parts(saving.checkpointed)(saving.parts)

    def in_parts(self, checkpointed: bool) -> Callable[[int], Memory]:
        """Return the function from a number of parts to memory, which has a term of the batch and a term of a part.

        Both follow from two and from four parts, as counting many takes long. The backward pass of a small part needs
        less than the heads of the whole batch.
        """
        two, four = (self._counted(Saving(parts, checkpointed)) for parts in (2, 4))
        of_batch, of_part = 2 * four.peak - two.peak, 4 * (two.peak - four.peak)
        least = four.standing if self.stage in OF_SINGLE_IMAGES else four.at_loss
        return lambda parts: replace(four, peak=max(of_batch + of_part / parts, least))

    def fitting_parts(self, checkpointed: bool, limit: float) -> list[tuple[Saving, float]]:
        """Return the fewest equal parts of the batch that fit into `limit` bytes, with their peak; none if none do."""
        memory_in = self.in_parts(checkpointed)
        equal = [parts for parts in range(2, self.batch + 1) if self.batch % parts == 0]
        peaks = [(Saving(parts, checkpointed), memory_in(parts).peak) for parts in equal]
        return [(saving, peak) for saving, peak in peaks if peak <= limit][:1]

    def _counted(self, saving: Saving) -> Memory:
        size, channels = self.params.data.image_size, self.params.data.channels
        summed = saving.parts > 1 and self.stage in OF_SINGLE_IMAGES
        batch = self.batch
        if saving.parts > 1:  # a multiple of four, which both two and four parts divide
            batch = -(-batch // 4) * 4 // (saving.parts if summed else 1)

        def build() -> tuple[nn.Module, Callable[[], Tensor]]:
            parts, loss_of = stage_model(self.stage, self.params, self.images, saving)
            return parts, lambda: loss_of(torch.empty(batch, channels, size, size))

        return measure_memory(build, 2 if summed else 1)


def plan_stage(stage: str, params: Params, images: int, machine: Machine) -> StagePlan:
    """Plan one stage.

    Args:
        stage: one of `arms.TRAINED`.
        params: the whole file.
        images: number of images in an epoch.
        machine: the machine to train on.
    """
    section: TrainingParams = getattr(params, stage)
    saving = Saving.of(stage, params.run)
    cost = stage_cost(stage, params, images=images, saving=saving)
    per_epoch = images // section.batch_size
    steps, head_steps = section.epochs * per_epoch, getattr(section, "head_warmup_epochs", 0) * per_epoch
    flops = cost.flops_per_image * steps
    if head_steps:
        flops += stage_cost(stage, params, True, images, saving).flops_per_image * head_steps
    step = Step(stage, params, images, -(-section.batch_size // machine.gpus))
    # several processes keep their gradients from step to step
    shared = 4 * cost.trained if machine.gpus > 1 else 0
    now = step.memory(saving)
    memory = (now.peak + shared) / GIB
    seconds = flops * section.batch_size / (machine.gpus * machine.tflops * 1e12)
    warnings = []
    if steps == 0:
        warnings.append(f"{stage}.batch_size {section.batch_size} is larger than the {images} images")
    if section.batch_size % machine.gpus:
        warnings.append(f"{stage}.batch_size {section.batch_size} does not divide among {machine.gpus} GPUs")
    if memory > machine.memory_gib:
        said = f"{stage} needs {memory:.3g} GiB for {step.batch} images a GPU, a GPU has {machine.memory_gib:g} GiB"
        ways = _ways_to_fit(step, saving, now, cost.flops_per_image, machine.memory_gib * GIB - shared)
        warnings.append(f"{said}: {'; '.join(ways)}")
    return StagePlan(stage, cost, steps + head_steps, memory, seconds / 3600, seconds * machine.gpus / 86400, warnings)


def _ways_to_fit(step: Step, saving: Saving, now: Memory, flops: float, limit: float) -> list[str]:
    """Say what makes a step fit into `limit` bytes, and how many more operations that takes.

    Args:
        step: that does not fit.
        saving: as it is now.
        now: its memory.
        flops: of an image.
        limit: of bytes.
    """
    most = int((limit - now.standing) / (now.peak - now.standing) * step.batch)
    ways = [f"at most {most} images a GPU fit" if most > 0 else "the weights alone do not fit"]
    checkpointed = replace(saving, checkpointed=True)
    tried = [] if saving.checkpointed else [(checkpointed, step.memory(checkpointed).peak)]
    fitting = [(way, peak) for way, peak in tried if peak <= limit] + step.fitting_parts(saving.checkpointed, limit)
    for way, peak in fitting or step.fitting_parts(True, limit):
        more = stage_cost(step.stage, step.params, images=step.images, saving=way).flops_per_image / flops - 1
        said = f"{more:.0%} more operations" if more > 0.001 else "no more operations"
        ways.append(f"{way.keys(step.stage)} takes {peak / GIB:.3g} GiB and {said}")
    return ways


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
