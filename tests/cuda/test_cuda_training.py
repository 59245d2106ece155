"""Training on a CUDA device equals training on the CPU, to a tolerance. Without a device these tests are skipped."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from arrivals import SMALL_VIEWS
from card import CARD, CPU, ON_CARD, full_products  # noqa: F401 - a fixture
from conftest import Silent, merged
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lgp.compute.precision import choose_precision, place
from lgp.compute.randomness import generator
from lgp.data.labels import LabelledImages
from lgp.data.views import ColorJitter, color_jitter
from lgp.models.encoder_folder import load_encoder, save_encoder
from lgp.models.exporting import export_program
from lgp.models.heads_file import load_heads, save_heads
from lgp.params.file import Params
from lgp.params.pretrain import ViewParams
from lgp.pretrain.arm import Objective, Pretrained, Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.mim import pretrain_mim
from lgp.training.loop import Trainer
from lgp.training.optimizer import adamw, parameter_groups
from lgp.training.resume_states import StateStore

pytestmark = ON_CARD
PRETRAIN: dict[str, Callable[[Session], Pretrained]] = {"mim": pretrain_mim, "cl": pretrain_cl}
OBJECTIVES = ["mim", "mocov3", "vicreg", "simclr", "swav", "refine"]


@pytest.fixture
def on_card(values: Any) -> Callable[..., Params]:
    """Return parameters of trainings on the device, with changed keys of `run`."""
    return lambda **run: Params.model_validate(
        merged(values, {"run": {"device": CARD.type, "precision": "fp32", "online_knn": {"every_epochs": 0}} | run})
    )


class _BuiltError(Exception):
    """Ends a pre-training where its objective is built."""


def built(name: str, params: Params, data: LabelledImages, folder: Path, patch: pytest.MonkeyPatch) -> Objective:
    """Return what a pre-training would train, on the CPU."""
    arm = "mim" if name == "mim" else "cl"
    if arm == "cl":
        chosen = params.contrastive.model_copy(update={"objective": name})
        params = params.model_copy(update={"contrastive": chosen})
    found: list[Objective] = []

    def take(objective: Objective, *_: Any) -> None:
        found.append(objective)
        raise _BuiltError

    patch.setattr(f"lgp.pretrain.{arm}.fit_arm", take)
    with pytest.raises(_BuiltError):
        PRETRAIN[arm](Session(data, params, StateStore(folder, "code"), Silent()))
    return found[0]


def backward(objective: Objective, device: torch.device, precision: torch.dtype = torch.float32) -> Tensor:
    """Compute loss and gradients of the first batch on a device."""
    objective.model.to(device).train()
    crops = objective.crops
    batch = crops.batch(0, crops[0].to(device))
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        loss = objective.loss_of(batch)
    loss.backward()
    return loss.detach().cpu()


def apart(one: Tensor, other: Tensor) -> float:
    """Return the distance of two tensors, relative to the second."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


def gradients(objective: Objective) -> Tensor:
    learned = [p.grad.flatten().cpu() for p in objective.model.parameters() if p.grad is not None]
    return torch.cat(learned)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_those_of_the_cpu(
    name: str, prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (built(name, params, prepared, tmp_path, monkeypatch) for _ in range(2))
    losses = [backward(here, CPU), backward(there, CARD)]
    assert float(losses[0]) > 0
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4)
    assert apart(gradients(there), gradients(here)) < 1e-3
    assert {p.device.type for p in there.model.parameters()} == {CARD.type}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_in_bf16_are_near_those_in_fp32(
    name: str, prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, mixed = (built(name, params, prepared, tmp_path, monkeypatch) for _ in range(2))
    losses = [backward(full, CARD), backward(mixed, CARD, torch.bfloat16)]
    assert losses[1] != losses[0]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=0.02)
    assert apart(gradients(mixed), gradients(full)) < 0.4  # without bf16 it is below 1e-3
    assert {p.grad.dtype for p in mixed.model.parameters() if p.grad is not None} == {torch.float32}


def test_bf16_is_chosen_at_any_width(on_card: Callable[..., Params]) -> None:
    auto = on_card(precision="auto").run
    assert choose_precision(auto, CARD, 16) == torch.bfloat16


@pytest.mark.parametrize("name", ["mim", "mocov3"])
def test_steps_of_the_fused_optimizer_equal_those_of_the_cpu(
    name: str, prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate, here, there = 1e-3, *(built(name, params, prepared, tmp_path, monkeypatch) for _ in range(2))
    start = {n: p.detach().clone() for n, p in here.model.named_parameters()}
    for objective, device in ((here, CPU), (there, CARD)):
        objective.model.to(device)
        rates = {n: rate for n, _ in objective.model.named_parameters()}
        optimizer = adamw(parameter_groups(objective.model, rates, 0.05), (0.9, 0.95))
        for _ in range(2):
            optimizer.zero_grad()
            backward(objective, device)
            optimizer.step()
    theirs = dict(there.model.named_parameters())
    moved = torch.cat([(p.detach() - start[n]).flatten() for n, p in here.model.named_parameters()])
    off = torch.cat([(theirs[n].detach().cpu() - p.detach()).flatten() for n, p in here.model.named_parameters()])
    assert float(moved.abs().mean()) > 0.1 * rate
    # a gradient near zero may differ in its sign, which is a whole step of AdamW, so the mean is compared
    assert float(off.abs().mean()) < 0.02 * float(moved.abs().mean())


def test_colour_operations_equal_those_of_the_cpu() -> None:
    every = ViewParams(
        crop_scale_min=0.2, jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale_p=0.2,
        blur_p=(0.5, 0.5), solarize_p=(0.3, 0.3),
    )  # fmt: skip
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    jitter = ColorJitter.draw(64, 0, every, generator(0, "cuda"))
    here, there = (color_jitter(images.to(device), jitter, every).cpu() for device in (CPU, CARD))
    assert not torch.equal(here, images)
    assert float((there - here).abs().max()) < 1e-4


def trained(arm: str, params: Params, data: LabelledImages, folder: Path) -> Pretrained:
    return PRETRAIN[arm](Session(data, params, StateStore(folder, "code"), Silent(), data))


def losses_of(result: Pretrained) -> list[float]:
    return [epoch["train/loss"] for epoch in result.progression.history]


@pytest.mark.parametrize("arm", list(PRETRAIN))
def test_whole_training_has_the_losses_of_the_cpu_and_returns_to_it(
    arm: str, prepared: LabelledImages, params: Params, on_card: Callable[..., Params], tmp_path: Path
) -> None:
    here, there = trained(arm, params, prepared, tmp_path / "1"), trained(arm, on_card(), prepared, tmp_path / "2")
    # TF32 products
    assert losses_of(there) == pytest.approx(losses_of(here), rel=0.01)
    assert there.computed["device"] == CARD.type
    assert {t.device.type for t in there.model.state_dict().values()} == {"cpu"}
    # older versions of torch do not count attention on a CPU
    counted = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry
    assert there.progression.train_flops >= here.progression.train_flops > 0
    assert not counted or there.progression.train_flops == here.progression.train_flops
    assert not there.checks.faults


@pytest.mark.parametrize("arm", list(PRETRAIN))
def test_workers_and_pinned_memory_change_nothing(
    arm: str, prepared: LabelledImages, on_card: Callable[..., Params], tmp_path: Path
) -> None:
    alone, helped = (
        trained(arm, on_card(workers=workers), prepared, tmp_path / str(workers)) for workers in (0, 2)
    )  # fmt: skip
    assert losses_of(helped) == pytest.approx(losses_of(alone), rel=1e-3)


@pytest.mark.parametrize(
    ("arm", "changes", "as_graphs"),
    [
        ("mim", {}, True),
        ("mim", {"run": {"accumulate": {"mim": 2}}}, True),
        ("cl", {"contrastive": {"objective": "mocov3"}}, True),
        ("cl", {"contrastive": {"objective": "vicreg"}}, True),
        ("cl", {"contrastive": {"objective": "swav", "small_views": SMALL_VIEWS}}, True),
        ("cl", {"contrastive": {"objective": "refine"}}, True),
        ("cl", {"run": {"online_knn": {"every_epochs": 1}}}, True),
        ("mim", {"mim": {"epochs": 10}}, True),  # looked at ten times, whether it is dead
        ("cl", {"run": {"accumulate": {"cl": 2}}}, False),
        ("cl", {"run": {"grad_checkpointing": ["cl"]}}, False),
    ],
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_run_as_graphs_and_train_to_the_same_losses(
    arm: str,
    changes: dict[str, Any],
    as_graphs: bool,
    prepared: LabelledImages,
    on_card: Callable[..., Params],
    tmp_path: Path,
) -> None:
    from torch._inductor.cudagraph_trees import get_manager  # loads the compiler

    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    base = merged(on_card().model_dump(mode="json", exclude_unset=True), changes)
    eager, compiled = (
        trained(arm, Params.model_validate(merged(base, {"run": {"compile": c}})), prepared, tmp_path / str(c))
        for c in (False, True)
    )
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    assert (get_manager(torch.cuda.current_device(), create_if_none_exists=False) is not None) == as_graphs
    assert not counters["inductor"]["cudagraph_skips"]
    assert losses_of(compiled) == pytest.approx(losses_of(eager), rel=0.01)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()


@pytest.mark.parametrize("arm", list(PRETRAIN))
def test_resumed_training_equals_an_uninterrupted_one(
    arm: str,
    prepared: LabelledImages,
    on_card: Callable[..., Params],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    whole = trained(arm, on_card(), prepared, tmp_path / "whole")
    monkeypatch.setattr("lgp.training.loop.SAVE_SHARE", math.inf)
    monkeypatch.setattr("lgp.training.saving.BackgroundSaver.is_busy", False)  # so each state is waited for
    step = Trainer._step

    def interrupted(self: Trainer, batch: Any, total: int) -> None:
        if self.now.step == 4:
            raise _BuiltError
        step(self, batch, total)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(_BuiltError):
            trained(arm, on_card(save_every_s=1e-9), prepared, tmp_path / "state")
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "_step", lambda self, b, t: (steps.append(self.now.step), step(self, b, t))[1])
    resumed = trained(arm, on_card(), prepared, tmp_path / "state")
    assert steps[0] == 4
    assert losses_of(resumed) == pytest.approx(losses_of(whole), rel=1e-3)
    weights = whole.model.state_dict()
    assert all(apart(tensor, weights[name]) < 0.01 for name, tensor in resumed.model.state_dict().items())
    # a CUDA device has no promise of equal bytes: the result is written into the report of the tests
    equal = all(torch.equal(tensor, weights[name]) for name, tensor in resumed.model.state_dict().items())
    record_property("equal_bytes", equal)


def test_encoder_trained_on_the_device_is_saved_loaded_and_exported(
    prepared: LabelledImages, on_card: Callable[..., Params], tmp_path: Path
) -> None:
    params = on_card(precision="auto")
    result = trained("cl", params, prepared, tmp_path / "state")
    folder = tmp_path / "arm" / "encoder"
    save_encoder(folder, result.model.encoder, params.model, params.data, prepared.normalization, {})
    save_heads(folder.parent, result.model.heads(), result.model.first_fc())
    loaded = load_encoder(folder).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in result.model.encoder.state_dict().items())
    assert load_heads(folder.parent).keys() == result.model.heads().keys()
    assert "differs from the model" in export_program(folder, tmp_path / "encoder.pt2")


def test_model_is_placed_with_channels_last_patches(
    prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = built("mim", params, prepared, tmp_path, monkeypatch)
    place(objective.model, CARD, torch.float32)
    weight = objective.model.encoder.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.get_float32_matmul_precision() == "high"
