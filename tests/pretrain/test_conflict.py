"""The measured gradient conflict against gradients taken one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from arrivals import saved_encoder
from conftest import Silent, is_foreign, merged
from torch import Tensor

from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch
from lgp.errors import LgpError
from lgp.models.encoder_folder import load_encoder
from lgp.models.vit import tokens_by_block
from lgp.params.file import Params
from lgp.params.pretrain import SmallViews
from lgp.pretrain import conflict, sanity_checks
from lgp.pretrain.arm import LossOf, Session
from lgp.pretrain.conflict import measure_conflict
from lgp.pretrain.sanity_checks import Findings
from lgp.training.resume_states import StateStore

Loss = LossOf


@pytest.fixture
def session(tmp_path: Path, values: Any, prepared: LabelledImages) -> Session:
    params = Params.model_validate(merged(values, {"conflict": {"head_epochs": 1, "batches": 3, "batch_size": 32}}))
    return Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())


@pytest.fixture
def start(tmp_path: Path, session: Session) -> Path:
    return saved_encoder(tmp_path / "mim" / "encoder", session.params, session.data, 1)


def spied(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Any, Loss], Loss]) -> None:
    """Wrap a builder of losses: `change` gets the model and its loss, and gives the loss to use."""
    build = getattr(conflict, name)
    monkeypatch.setattr(conflict, name, lambda stage, model, *rest: change(model, build(stage, model, *rest)))


def test_cosines_are_those_of_gradients_taken_one_by_one(
    session: Session, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: list[dict[str, Tensor]] = []

    def watch(model: Any, loss_of: Loss) -> Loss:
        def watched(batch: Batch) -> Tensor:
            if model.encoder.norm.weight.requires_grad:  # the heads are trained, now it is measured
                model.zero_grad()
                loss_of(batch).backward()
                blocks = {f"block{i}": b for i, b in enumerate(model.encoder.blocks)}
                slow.append({n: torch.cat([p.grad.flatten() for p in b.parameters()]) for n, b in blocks.items()})
                model.zero_grad()
            return loss_of(batch)

        return watched

    spied(monkeypatch, "masked_loss_of", watch)
    spied(monkeypatch, "contrastive_loss_of", watch)
    table = measure_conflict(session, start)
    assert sorted(table["block"].unique()) == ["block0", "block1", "block2", "embed", "norm"]
    for _, row in table[table["block"].str.startswith("block")].iterrows():
        of_mim, of_cl = slow[2 * row["batch"]][row["block"]], slow[2 * row["batch"] + 1][row["block"]]
        dot = sum(a * b for a, b in zip(of_mim.double().tolist(), of_cl.double().tolist(), strict=True))
        assert row["cosine"] == pytest.approx(dot / (of_mim.norm() * of_cl.norm()).item(), abs=1e-4)
        assert row["mim_norm"] == pytest.approx(of_mim.norm().item(), rel=1e-4)


def test_gradients_are_of_the_small_views_too(session: Session, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()

    def watch(_: Any, loss_of: Loss) -> Loss:
        def watched(batch: Batch) -> Tensor:
            shapes.add(None if batch.small is None else tuple(batch.small.shape[1:]))
            return loss_of(batch)

        return watched

    spied(monkeypatch, "contrastive_loss_of", watch)
    contrastive = session.params.contrastive.model_copy(update={"small_views": SmallViews(count=2, size=4)})
    measure_conflict(replace(session, params=session.params.model_copy(update={"contrastive": contrastive})), start)
    assert shapes == {(2, session.data.channels, 4, 4)}


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_and_opposite_losses_agree_and_disagree_fully(
    sign: int, session: Session, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[Loss] = []
    spied(monkeypatch, "masked_loss_of", lambda _, loss_of: losses.append(loss_of) or loss_of)  # type: ignore[func-returns-value]
    spied(monkeypatch, "contrastive_loss_of", lambda _, __: lambda batch: sign * losses[0](batch))
    monkeypatch.setattr(conflict, "fit_arm", lambda *_: SimpleNamespace(checks=Findings()))
    assert measure_conflict(session, start)["cosine"].to_numpy() == pytest.approx(sign, abs=1e-5)


def test_fitting_the_heads_leaves_the_encoder_as_it_was(
    session: Session, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[Any] = []
    fit = conflict.fit_arm
    monkeypatch.setattr(conflict, "fit_arm", lambda *args: fitted.append(fit(*args)) or fitted[0])  # type: ignore[func-returns-value]
    measure_conflict(session, start)
    before = load_encoder(start).state_dict()
    assert all(torch.equal(t, before[n]) for n, t in fitted[0].model.encoder.state_dict().items())
    moved = {name for name, share in fitted[0].checks.metrics.items() if name.startswith("moved/") and share}
    assert moved == {"moved/heads", "moved/momentum_projector"}


def test_both_losses_are_of_images_with_the_encoders_statistics(
    session: Session, foreign_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    load = conflict.load_encoder

    def watched(folder: Path) -> Any:
        encoder = load(folder)
        encoder.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        return encoder

    monkeypatch.setattr(conflict, "load_encoder", watched)
    monkeypatch.setattr(conflict, "fit_arm", lambda *_: SimpleNamespace(checks=Findings()))
    measure_conflict(session, foreign_folder)
    assert len(seen) >= 3 * 2
    assert all(map(is_foreign, seen))


def test_heads_that_do_not_train_are_told(session: Session, start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanity_checks, "MIN_EFFECTIVE_RANK", 1e3)
    with pytest.raises(LgpError, match=r"the heads did not train on the encoder in .*: the features collapsed"):
        measure_conflict(session, start)


def test_tokens_of_the_last_block_end_in_the_features(session: Session, start: Path) -> None:
    encoder = load_encoder(start).eval()
    images = torch.randn(4, 1, 8, 8)
    tokens = tokens_by_block(encoder, images)
    assert len(tokens) == 3
    assert torch.allclose(tokens[-1][:, 0], encoder(images), atol=1e-6)
