"""The measured gradient conflict against gradients taken one by one, and the cut that is read off it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from arrivals import saved_encoder
from conftest import FOREIGN, Silent, is_foreign, merged
from torch import Tensor

from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch
from lgp.errors import LgpError
from lgp.features.extraction import extract, features_of
from lgp.features.knn import knn_predict
from lgp.models.encoder_folder import load_encoder, save_texts
from lgp.models.files import encoder_digest
from lgp.models.vit import tokens_by_block
from lgp.params.file import Params
from lgp.params.graft import LayerDecayParams, StageLrParams
from lgp.params.pretrain import SmallViews
from lgp.pretrain import conflict, sanity_checks
from lgp.pretrain.arm import LossOf, Session
from lgp.pretrain.conflict import measure_conflict
from lgp.pretrain.cut import advice, knn_by_block, mim_epochs, rates_for, read_conflict, suggest_cut
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


def test_knn_by_block_is_of_images_with_the_encoders_statistics(session: Session, foreign_folder: Path) -> None:
    prepared, foreign = session.data, session.data.normalized_by(FOREIGN)
    found, expected = (knn_by_block(foreign_folder, data, session.params) for data in (prepared, foreign))
    assert found == expected


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


def test_knn_by_block_is_knn_of_each_blocks_mean_token(session: Session, start: Path) -> None:
    data, encoder = session.data, load_encoder(start).eval()
    train, val = data.ids("train"), data.ids("val")
    with torch.inference_mode():
        x = [tokens_by_block(encoder, data.normalize(data.whole(i)))[1].mean(dim=1).numpy() for i in (train, val)]
    predicted = knn_predict(x[0], data.labels[train], x[1], 10, 20, 0.07)
    expected = 100 * (predicted == data.labels[val]).mean()
    assert knn_by_block(start, data, session.params)[1] == pytest.approx(expected, abs=0.01)
    assert extract(features_of(encoder, torch.device("cpu")), data, val).shape == (len(val), 16)


def cosines(values: list[float]) -> pd.DataFrame:
    rows = [(f"block{i}", batch, v + 0.01 * batch) for i, v in enumerate(values) for batch in range(-1, 2)]
    return pd.DataFrame([*rows, ("embed", 0, 0.0)], columns=["block", "batch", "cosine"])


def test_cut_is_where_the_cosine_falls() -> None:
    found = suggest_cut(cosines([0.3, 0.28, 0.31, 0.29, -0.1, -0.12]), [10, 20, 30, 40, 50, 60])
    assert (found.lower_blocks, found.by_conflict, found.by_knn) == (4, 4, 5)
    assert found.cosines == pytest.approx([0.3, 0.28, 0.31, 0.29, -0.1, -0.12])


def test_without_growing_conflict_the_features_decide() -> None:
    found = suggest_cut(cosines([-0.1, -0.1, 0.2, 0.2]), [50, 70, 60, 40])
    assert (found.lower_blocks, found.by_conflict, found.by_knn) == (2, None, 2)
    assert suggest_cut(cosines([0.0] * 4), [10, 20, 30, 40]).lower_blocks == 3  # never all


def test_noise_is_no_conflict_that_grows() -> None:
    rng = np.random.default_rng(0)
    rows = [(f"block{i}", b, rng.normal()) for i in range(12) for b in range(50)]
    tables = [
        pd.DataFrame(rows, columns=["block", "batch", "cosine"]).assign(cosine=rng.normal(size=600)) for _ in range(40)
    ]
    assert sum(suggest_cut(table, [50.0] * 12).by_conflict is not None for table in tables) <= 2


def test_conflict_of_another_depth_is_refused() -> None:
    with pytest.raises(LgpError, match="measured in 4 blocks, the encoder has 6"):
        suggest_cut(cosines([0.0] * 4), [50.0] * 6)


@pytest.mark.parametrize(
    ("lower", "depth", "rates"),
    [(8, 12, [1, 1, 9]), (6, 12, [1, 9]), (5, 12, [1] * 5 + [9] * 7), (12, 12, [1]), (4, 6, [1, 1, 9])],
)
def test_suggested_rates_cut_where_asked(lower: int, depth: int, rates: list[float]) -> None:
    assert rates_for(lower, depth, 1, 9) == rates


def test_a_table_of_another_encoder_is_refused(session: Session, start: Path, tmp_path: Path) -> None:
    path = tmp_path / "mim.csv"
    with pytest.raises(LgpError, match=r"no .*mim\.csv: run `lgp conflict mim` first"):
        read_conflict(path, start)
    cosines([0.1, 0.2]).assign(encoder=encoder_digest(start)).to_csv(path, index=False)
    assert read_conflict(path, start)["cosine"].tolist() == cosines([0.1, 0.2])["cosine"].tolist()
    saved_encoder(start, session.params, session.data, 2)
    with pytest.raises(LgpError, match=r"was measured on another encoder of mim: run `lgp conflict mim` again"):
        read_conflict(path, start)


def test_advice_says_why_and_which_parameters(params: Params) -> None:
    graft = params.graft.model_copy(update={"policy": ("stage_lr",), "stage_lr": StageLrParams(base_lrs=[1e-3, 4e-3])})
    grows = suggest_cut(cosines([0.3, 0.28, 0.31, 0.29, -0.1, -0.12]), [10, 20, 30, 40, 50, 60])
    cut = "cut after the lowest 4 of 6 blocks (conflict grows there; features are best after 5)"
    held = [
        "  graft.stage_lr.base_lrs: [0.0004, 0.0004, 0.004]  # the lower blocks at a tenth, as in the paper",
        "  or graft.freeze, graft.l1, graft.scratch_end with lower_blocks: 4",
    ]
    assert advice(grows, 6, graft, 1000) == [cut, "its MIM had 1,000 epochs: hold the lower blocks back", *held]
    assert advice(grows, 6, graft, 999) == [
        cut,
        "its MIM had 999 epochs: let all blocks learn at one rate. After fewer than 1,000 epochs holding the lower "
        "ones back lost on digits",
        "  graft.stage_lr.base_lrs: [0.004]",
    ]
    assert advice(grows, 6, graft, None) == [
        cut,
        "how many epochs of MIM it had is not recorded: compare on val",
        "  graft.stage_lr.base_lrs: [0.004]",
        *held,
    ]
    flat = suggest_cut(cosines([-0.1, -0.1, 0.2, 0.2]), [50, 70, 60, 40])
    decided = "cut after the lowest 2 of 4 blocks (conflict does not grow with depth, the features decide"
    assert decided in advice(flat, 4, graft, 120)[0]


def test_advice_keeps_the_rate_of_layer_decay(params: Params) -> None:
    graft = params.graft.model_copy(
        update={"policy": ("layer_decay",), "layer_decay": LayerDecayParams(base_lr=8e-3, decay=0.75)}
    )
    found = suggest_cut(cosines([0.0] * 4), [10, 20, 30, 40])
    assert advice(found, 4, graft, 120)[2] == "  graft.stage_lr.base_lrs: [0.008]"


def test_epochs_are_those_of_the_mim_that_trained_an_encoder(start: Path) -> None:
    assert mim_epochs(start) is None  # from elsewhere
    for stage, epochs in (("mim", 120), ("cl", None)):
        save_texts(start, {}, {"stage": stage, "metrics": {"train/epochs": 120}})
        assert mim_epochs(start) == epochs
