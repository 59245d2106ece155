"""Ways to train in less memory: parts of a batch, and checkpointed blocks. Neither changes what is learnt."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from arrivals import Coloured, EnoughError
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from lgp.compute.interruption import Interrupted, Interruption
from lgp.compute.precision import place
from lgp.data.storage import Images
from lgp.evaluate.fine_tuning import finetune
from lgp.pretrain import arm as arm_module
from lgp.training.loop import Trainer

CONTRASTIVE = (
    "cl", "cl_masked", "cl_masked_keys", "cl_one_sided", "cl_simclr", "cl_vicreg", "cl_multi_crop",
    "cl_swav_multi_crop", "cl_refine", "graft_refine_multi_crop", "graft_lora", "joint",
)  # fmt: skip
EXACT = 1e-9  # relative, in double precision
TUNED: dict[str, Any] = {
    "epochs": 2, "warmup_epochs": 1, "batch_size": 12, "base_lr": 0.5, "layer_decay": 0.75, "drop_path": 0.5,
    "mixup": 0.8, "pool": "average",
}  # fmt: skip


@dataclass
class Seen:
    """The loss of a step, and its gradients and the model's buffers by name."""

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@contextmanager
def seeing(most: int) -> Iterator[list[Seen]]:
    """Keep what is seen of the steps in the block, whose end is after `most` of them."""
    seen: list[Seen] = []
    backward, step = Trainer._backward, Trainer._step

    def watched_backward(trainer: Trainer, *rest: Any) -> Tensor:
        loss = backward(trainer, *rest)
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        seen.append(Seen(loss.item(), gradients, {n: b.clone() for n, b in trainer.model.named_buffers()}))
        return loss

    def watched_step(trainer: Trainer, *rest: Any) -> None:
        step(trainer, *rest)
        if len(seen) == most:
            raise EnoughError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_backward", watched_backward)
        patch.setattr(Trainer, "_step", watched_step)
        try:
            yield seen
        except EnoughError:
            return
        pytest.fail(f"only {len(seen)} steps")


@pytest.fixture
def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pre-trainings compute in double precision."""
    normalize = Images.normalize
    monkeypatch.setattr(arm_module, "place", lambda model, *rest: place(model.double(), *rest))
    monkeypatch.setattr(Images, "normalize", lambda self, images: normalize(self, images).double())


def steps_of(name: str, coloured: Coloured, folder: Path, most: int = 2, **run: Any) -> list[Seen]:
    """Train one of `ARMS` for some steps."""
    batch_size = {"batch_size": 12}
    with seeing(most) as seen:
        coloured.train(name, folder, {"run": run, "graft": batch_size, "cl": batch_size, "joint": batch_size})
    return seen


def assert_close(one: Seen, other: Seen) -> None:
    """Compare two steps in double precision."""
    assert other.loss == pytest.approx(one.loss, rel=EXACT)
    assert other.gradients.keys() == one.gradients.keys()
    # some are 0 but for rounding: VICReg's loss does not change with the bias of the last norm
    least = 1e-6 * max(gradient.norm() for gradient in one.gradients.values())
    for parameter, gradient in one.gradients.items():
        error = (other.gradients[parameter] - gradient).norm()
        assert error <= EXACT * gradient.norm().clamp(min=least), parameter
    for buffer, tensor in one.buffers.items():  # statistics of BatchNorm, and queues
        assert torch.allclose(other.buffers[buffer], tensor, rtol=EXACT), buffer


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_contrastive_batch_in_parts_has_losses_and_gradients_of_the_whole(
    name: str, coloured: Coloured, in_double: None, tmp_path: Path
) -> None:
    whole = steps_of(name, coloured, tmp_path / "whole")
    parts = steps_of(name, coloured, tmp_path / "parts", accumulate={name.split("_")[0]: 4})
    for one, other in zip(whole, parts, strict=True):
        assert_close(one, other)


def test_penalty_is_added_once_to_a_batch_in_parts(coloured: Coloured, in_double: None, tmp_path: Path) -> None:
    # its gradient is the sign of a difference, which is the same only as long as rounding has not moved a weight
    (whole,) = steps_of("graft_l1", coloured, tmp_path / "whole", 1)
    (parts,) = steps_of("graft_l1", coloured, tmp_path / "parts", 1, accumulate={"graft": 4})
    assert_close(whole, parts)


@pytest.mark.parametrize("name", ["cl_masked", "graft_refine_multi_crop"])
def test_parts_and_checkpointed_blocks_go_together(
    name: str, coloured: Coloured, in_double: None, tmp_path: Path
) -> None:
    arm, whole = name.split("_")[0], steps_of(name, coloured, tmp_path / "whole")
    both = steps_of(name, coloured, tmp_path / "both", accumulate={arm: 3}, grad_checkpointing=[arm])
    for one, other in zip(whole, both, strict=True):
        assert_close(one, other)


def assert_equal(plain: list[Seen], other: list[Seen]) -> None:
    """Compare steps to the byte."""
    for one, two in zip(plain, other, strict=True):
        assert two.loss == one.loss
        assert two.gradients.keys() == one.gradients.keys()
        for parameter, gradient in one.gradients.items():
            assert torch.equal(two.gradients[parameter], gradient), parameter


@pytest.mark.parametrize("name", ["mim", "cl_masked", "cl_swav", "graft_refine_multi_crop", "graft_lora", "joint"])
def test_checkpointed_blocks_have_the_same_bytes(name: str, coloured: Coloured, tmp_path: Path) -> None:
    arm, calls = name.split("_")[0], list[int]()
    seen = []
    for names in ([], [arm]):
        with counting(Block) as of_training:
            seen.append(steps_of(name, coloured, tmp_path / str(len(names)), grad_checkpointing=names))
        calls.append(len(of_training))
    assert_equal(*seen)
    assert calls[1] == 2 * calls[0]


def tuned(coloured: Coloured, folder: Path, **run: Any) -> list[Seen]:
    """Fine-tune the first encoder for some steps, with dropped paths and mixed images."""
    session = coloured.session({"finetune": {"10pct": TUNED}, "run": run}, folder)
    with seeing(3) as seen:
        finetune(
            coloured.mim.parent, coloured.data, coloured.data.labelled("all"), session.params.recipe("10pct"), session
        )
    return seen


def test_checkpointed_fine_tuning_drops_the_same_paths(coloured: Coloured, tmp_path: Path) -> None:
    plain = tuned(coloured, tmp_path / "plain")
    with counting(Block) as calls:
        checkpointed = tuned(coloured, tmp_path / "checkpointed", grad_checkpointing=["finetune"])
    assert_equal(plain, checkpointed)
    assert len(calls) == 3 * 3 * 2  # steps, blocks


def test_other_trainings_stay_as_they_are(coloured: Coloured, tmp_path: Path) -> None:
    """A name turns on its own training alone, and nothing stays turned on."""
    with counting(Block) as calls:
        steps_of("cl", coloured, tmp_path, 1, grad_checkpointing=["mim"], accumulate={"mim": 3, "graft": 2})
    assert calls == [12] * 2 * 3


@contextmanager
def counting(kind: type) -> Iterator[list[int]]:
    """Note the number of images of each call of a module of a kind that learns, also of repeated calls."""
    calls: list[int] = []

    def note(module: Any, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, kind) and next(module.parameters()).requires_grad:
            calls.append(len(given[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "views"), [("cl", 2), ("cl_one_sided", 1), ("cl_multi_crop", 5), ("graft_refine_multi_crop", 5)]
)
def test_parts_pass_the_encoder_alone_and_twice(name: str, views: int, coloured: Coloured, tmp_path: Path) -> None:
    arm = name.split("_")[0]
    with counting(Block) as calls:
        steps_of(name, coloured, tmp_path, 1, accumulate={arm: 4})
    assert sum(calls) == 2 * views * 12 * 3  # images, blocks
    assert max(calls) == (9 if views == 5 else 3)  # three small views are encoded together


def test_training_in_parts_goes_on_from_its_state_to_the_same_bytes(
    coloured: Coloured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"run": {"accumulate": {"cl": 2}, "grad_checkpointing": ["cl"]}}
    whole = coloured.train("cl_refine", tmp_path / "whole", run)
    steps = list[int]()
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "asked", lambda self: steps.append(0) or len(steps) == 4)  # type: ignore[func-returns-value]
        with pytest.raises(Interrupted, match="stopped at step 4"):
            coloured.train("cl_refine", tmp_path / "again", run)
    again = coloured.train("cl_refine", tmp_path / "again", run)
    assert again.progression.history == whole.progression.history
    assert all(torch.equal(t, again.model.state_dict()[name]) for name, t in whole.model.state_dict().items())
    encoders = [m for m in again.model.modules() if isinstance(m, VisionTransformer)]
    assert not any(encoder.grad_checkpointing for encoder in encoders)


def test_heads_alone_learn_in_parts(coloured: Coloured, in_double: None, tmp_path: Path) -> None:
    """The warm-up of new heads passes the frozen encoder once, in the parts of its arm."""
    changes = {"graft": {"batch_size": 12, "head_warmup_epochs": 1}}
    seen = []
    for name, of_run in (("whole", {}), ("parts", {"accumulate": {"graft": 4}})):
        with seeing(1) as steps:
            coloured.train("graft_layer_decay", tmp_path / name, changes | {"run": of_run})
        seen += steps
    assert_close(*seen)
    assert not any(name.startswith("encoder.") for name in seen[0].gradients)
