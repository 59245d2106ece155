"""The plan against counted FLOPs, the papers' formula, and arithmetic by hand."""

import itertools
from typing import Any

import pytest
import torch
from conftest import ROOT, merged
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lgp.errors import LgpError
from lgp.models.contrastive import build_contrastive
from lgp.models.vit import View, build_encoder
from lgp.params.file import Params, load_params
from lgp.params.pretrain import SmallViews
from lgp.pretrain.counted_step import BATCH, Cost, Memory, measure, measure_memory
from lgp.pretrain.mim import build_mae
from lgp.pretrain.plan import (
    GIB,
    PLAN_COLUMNS,
    Machine,
    Saving,
    StagePlan,
    Step,
    graft_rates_by_part,
    plan,
    plan_row,
    plan_stage,
    stage_cost,
    stage_model,
)


@pytest.fixture(scope="module")
def vit_b() -> Params:
    return load_params(ROOT / "presets" / "imagenet-vit-b16.yaml")


def forward_flops(tokens: int, width: int, depth: int) -> float:
    """Of a ViT's blocks (products count two): 12 D² parameters a token and block, and attention's two products."""
    return depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


@pytest.mark.parametrize("stage", ["mim", "cl"])
def test_flops_of_vit_b_agree_with_those_counted_in_a_real_step(stage: str, vit_b: Params) -> None:
    encoder = build_encoder(vit_b.model, vit_b.data)
    images = torch.randn(2, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        if stage == "mim":
            build_mae(encoder, vit_b.mim)(images, torch.rand(2, 196)).backward()
        else:
            build_contrastive(encoder, vit_b.contrastive)(View(images), View(images), 0.0).backward()
    assert stage_cost(stage, vit_b).flops_per_image == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_flops_of_vit_b_agree_with_the_formula(vit_b: Params) -> None:
    # two views, forward and backward (three times forward), and forward through the momentum encoder
    expected = 2 * (3 + 1) * forward_flops(197, 768, 12)
    assert stage_cost("cl", vit_b).flops_per_image == pytest.approx(expected, rel=0.02)
    expected = 3 * (forward_flops(50, 768, 12) + forward_flops(197, 512, 8))
    assert stage_cost("mim", vit_b).flops_per_image == pytest.approx(expected, rel=0.05)


def test_small_views_are_counted_each_with_its_patches(vit_b: Params) -> None:
    contrastive = vit_b.contrastive.model_copy(update={"small_views": SmallViews(count=6, size=96)})
    small = vit_b.model_copy(update={"contrastive": contrastive})
    more = stage_cost("cl", small).flops_per_image - stage_cost("cl", vit_b).flops_per_image
    # forward and backward of 36 patches and a class token; keys are of the large views alone
    assert more == pytest.approx(6 * 3 * forward_flops(37, 768, 12), rel=0.05)


def test_parameters_are_those_of_the_models(params: Params) -> None:
    model = build_contrastive(build_encoder(params.model, params.data), params.contrastive)
    cost = stage_cost("cl", params)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def layer_and_loss() -> tuple[nn.Module, Any]:
    layer = nn.Linear(8, 4, bias=False)
    return layer, lambda: torch.nn.functional.gelu(layer(torch.empty(BATCH, 8))).sum()


def test_operations_are_of_forward_and_of_the_weights_gradient() -> None:
    assert measure(layer_and_loss).flops_per_image == 2 * 2 * 8 * 4  # the input has no gradient


def test_memory_is_what_lives_at_once() -> None:
    """Weights, moments, and activations; then gradients of activations, and at the end that of the weights."""
    memory = measure_memory(layer_and_loss)
    weights, given, outputs = 8 * 4, BATCH * 8, BATCH * 4
    assert memory.standing == 4 * 3 * weights
    assert memory.at_loss == memory.standing + 4 * (given + outputs + 1)  # the layer's input, that of gelu, the loss
    # gelu's input is no longer needed when the gradient of the weights is made of the gradient of their output
    assert memory.peak == memory.standing + 4 * (given + outputs + weights + 2)
    two = measure_memory(layer_and_loss, passes=2)  # the gradient of the first pass stays, that of the second is added
    assert two.peak == memory.peak + 4 * weights


STEPS: dict[str, tuple[str, Saving, dict[str, Any]]] = {
    "mim": ("mim", Saving(), {}),
    "cl": ("cl", Saving(), {}),
    "cl in parts": ("cl", Saving(parts=4), {}),
    "cl with checkpointed blocks": ("cl", Saving(checkpointed=True), {}),
    "joint in parts": ("joint", Saving(parts=4), {}),
}


def real_peak(stage: str, params: Params, batch: int, saving: Saving) -> int:
    """Return the most bytes that torch has allocated on the CPU during a step, with AdamW's moments."""
    torch.manual_seed(0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model, loss_of = stage_model(stage, params, None, saving)
        moments = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
        loss_of(torch.randn(batch, params.data.channels, 8, 8)).backward()
        del model, moments, loss_of
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return int(max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))))


@pytest.mark.parametrize("name", STEPS)
def test_memory_is_that_of_a_real_step(name: str, values: Any) -> None:
    stage, saving, contrastive = STEPS[name]
    params = Params.model_validate(merged(values, {"contrastive": contrastive, "model": {"width": 64}}))
    counted = Step(stage, params, 1000, 256).memory(saving).peak
    assert counted == pytest.approx(real_peak(stage, params, 256, saving), rel=0.05)


def test_parts_that_are_not_counted_follow_from_those_that_are(values: Any) -> None:
    params = Params.model_validate(merged(values, {"model": {"width": 64}}))
    for stage in ("mim", "cl"):
        step = Step(stage, params, 1000, 256)
        assert step.memory(Saving(8)).peak == pytest.approx(step._counted(Saving(8)).peak, rel=0.02)


def test_freezing_saves_gradients_and_arithmetic(values: Any) -> None:
    plain = Params.model_validate(values)
    policy = {"policy": ["stage_lr", "freeze"], "freeze": {"lower_blocks": 2}}
    frozen = Params.model_validate(merged(values, {"graft": policy}))
    assert stage_cost("graft", frozen).trained < stage_cost("graft", plain).trained
    assert stage_cost("graft", frozen).flops_per_image < stage_cost("graft", plain).flops_per_image


def test_hours_and_memory_follow_from_the_machine(params: Params) -> None:
    one, four = (plan_stage("cl", params, 1000, Machine(gpus, 80, 2.0)) for gpus in (1, 4))
    steps = params.cl.epochs * (1000 // 64)
    assert one.steps == four.steps == steps
    assert one.hours == pytest.approx(one.cost.flops_per_image * 64 * steps / 2e12 / 3600)
    assert four.hours == pytest.approx(one.hours / 4)
    assert four.gpu_days == pytest.approx(one.hours / 24)
    assert four.memory_gib < one.memory_gib


@pytest.mark.parametrize(
    ("machine", "images", "message"),
    [
        (Machine(1, 0.001, 1.0), 1000, "images a GPU fit"),
        (Machine(1, 0.0001, 1.0), 1000, "the weights alone do not fit"),
        (Machine(3, 80, 1.0), 1000, "does not divide among 3 GPUs"),
        (Machine(1, 80, 1.0), 10, "is larger than the 10 images"),
    ],
)
def test_what_cannot_be_is_warned_of(params: Params, machine: Machine, images: int, message: str) -> None:
    assert any(message in warning for warning in plan_stage("cl", params, images, machine).warnings)


def counted(step: Step, saving: Saving) -> Memory:
    """Stand for the counted memory: 10 bytes stand, an image takes 1 of the batch and 10 of its part."""
    of_part = 10 * step.batch / saving.parts * (0.5 if saving.checkpointed else 1)
    return Memory(10, 10 + step.batch + of_part, 10 + step.batch)


@pytest.mark.parametrize(
    ("gib", "ways"),
    [
        (1000, "at most 90 images a GPU fit; run.grad_checkpointing: [cl] takes 610 GiB and 25% more operations; "
               "run.accumulate: {cl: 2} takes 610 GiB and 30% more operations"),
        (300, "at most 26 images a GPU fit; run.accumulate: {cl: 10} takes 210 GiB and 30% more operations"),
        (125, "at most 10 images a GPU fit; run.accumulate: {cl: 100} takes 120 GiB and 30% more operations"),
        (116, "at most 9 images a GPU fit; run.accumulate: {cl: 100} with run.grad_checkpointing: [cl] takes 115 GiB "
              "and 55% more operations"),
        (111, "at most 9 images a GPU fit"),
        (9, "the weights alone do not fit"),
    ],
)  # fmt: skip
def test_ways_to_fit_are_named_with_what_they_take(
    gib: int, ways: str, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(*_: Any, images: int, saving: Saving, **__: Any) -> Cost:
        assert images == 1000
        return Cost(0, 0, 100 + 30 * (saving.parts > 1) + 25 * saving.checkpointed)

    def in_gib(step: Step, saving: Saving) -> Memory:
        memory = counted(step, saving)
        return Memory(memory.standing * GIB, memory.peak * GIB, memory.at_loss * GIB)

    monkeypatch.setattr(Step, "_counted", in_gib)
    monkeypatch.setattr("lgp.pretrain.plan.stage_cost", cost)
    section = params.cl.model_copy(update={"batch_size": 100})
    (warning,) = plan_stage("cl", params.model_copy(update={"cl": section}), 1000, Machine(1, gib, 1.0)).warnings
    assert warning == f"cl needs 1.11e+03 GiB for 100 images a GPU, a GPU has {gib} GiB: {ways}"


def test_what_run_says_is_in_the_plan(values: Any) -> None:
    plain = plan_stage("cl", Params.model_validate(values), 1000, Machine(1, 80, 1.0))
    run = {"accumulate": {"cl": 2}, "grad_checkpointing": ["cl"]}
    saved = plan_stage("cl", Params.model_validate(merged(values, {"run": run})), 1000, Machine(1, 80, 1.0))
    assert saved.memory_gib < plain.memory_gib
    assert saved.hours > plain.hours


def test_queue_is_bounded_by_half_of_the_images(values: Any) -> None:
    """As in a training; a queue of all places costs the similarities to each of them."""
    refine = {"objective": "refine", "refine": {"queue": 4096}}
    params = Params.model_validate(merged(values, {"contrastive": refine}))
    few, many = (plan_stage("graft", params, images, Machine(1, 80, 1.0)).cost.flops_per_image for images in (64, 9000))
    # two targets of each of two large views' heads, against the places of the queue
    assert many - few == pytest.approx(2 * 2 * (4096 - 32) * params.contrastive.projector_dim)


def test_a_plan_is_written_in_units_that_a_person_reads(params: Params) -> None:
    cost = Cost(parameters=1_234_567, trained=1_000_000, flops_per_image=2.345e10)
    row = plan_row(StagePlan("mim", cost, 12345, memory_gib=1.2345, hours=0.09, gpu_days=0.3, warnings=[]))
    named = dict(zip(PLAN_COLUMNS, row, strict=True))
    assert named == {
        "stage": "mim",
        "parameters": "1.23 M",
        "work per image": "23.4 GFLOP",
        "steps": "12,345",
        "memory per GPU": "1.23 GiB",
        "time": "5.4 min",
        "GPU time": "7.2 h",
    }


def test_only_listed_arms_are_planned_and_none_is_told(values: Any) -> None:
    machine = Machine(1, 80, 1.0)
    assert [p.stage for p in plan(Params.model_validate(values), 1000, machine)] == ["mim", "cl", "graft"]
    imported = Params.model_validate(merged(values, {"arms": ["pixels", "mae"], "finetuned_arms": ["mae"]}))
    with pytest.raises(LgpError, match=r"arms lists pixels, mae, and none of mim, cl, graft, joint, reverse"):
        plan(imported, 1000, machine)


@pytest.mark.parametrize(("preset", "depth"), [("imagenet-vit-b16", 12), ("imagenet-vit-l16", 24)])
def test_table_of_parameter_groups_is_the_papers_rule(preset: str, depth: int) -> None:
    parts = graft_rates_by_part(load_params(ROOT / "presets" / f"{preset}.yaml"))
    lower = {"embed", *(f"block{i}" for i in range(depth * 2 // 3))}
    assert [p.part for p in parts] == ["embed", *(f"block{i}" for i in range(depth)), "norm", "heads"]
    assert {p.part: p.base_lr for p in parts} == pytest.approx(
        {p.part: 1.5e-5 if p.part in lower else 1.5e-4 for p in parts}
    )
    width = 64 * depth if depth == 12 else 1024
    block = next(p for p in parts if p.part == "block0")
    assert block.decayed == 12 * width**2  # attention 4 D², MLP 8 D²
    assert block.undecayed == 13 * width  # their biases, and two norms
    assert block.frozen == 0
