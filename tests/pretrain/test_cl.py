"""What contrastive training builds from its parameters, and what it gives its model at each step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Silent, merged

from lgp.compute.randomness import Stream
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, contrastive_crops
from lgp.models.contrastive import build_contrastive
from lgp.models.moco import MoCo, momentum_at
from lgp.models.refine import Refine
from lgp.models.simclr import SimCLR
from lgp.models.swav import SwAV
from lgp.models.vicreg import VICReg, vicreg_loss
from lgp.models.vit import View, build_encoder
from lgp.params.file import Params
from lgp.pretrain import cl, mim
from lgp.pretrain.arm import Session
from lgp.pretrain.cl import contrastive_loss_of, pretrain_cl
from lgp.pretrain.mim import pretrain_mim
from lgp.training.resume_states import StateStore


def session_of(values: Any, prepared: LabelledImages, tmp_path: Path, **contrastive: Any) -> Session:
    params = Params.model_validate(merged(values, {"contrastive": contrastive}))
    return Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())


@pytest.mark.parametrize(
    ("objective", "model"),
    [("mocov3", MoCo), ("simclr", SimCLR), ("vicreg", VICReg), ("swav", SwAV), ("refine", Refine)],
)
def test_every_objective_is_built_and_trains(
    objective: str, model: type, values: Any, prepared: LabelledImages, tmp_path: Path
) -> None:
    result = pretrain_cl(session_of(values, prepared, tmp_path, objective=objective))
    assert isinstance(result.model, model)
    copies = {"mocov3": {"momentum_encoder", "momentum_projector"}, "refine": {"averaged_encoder"}}.get(
        objective, set()
    )
    parts = {"embed", "block0", "block1", "block2", "norm", "heads"} | copies
    assert result.checks.metrics.keys() == {f"moved/{part}" for part in parts} | {
        "features/std",
        "features/effective_rank",
    }


def test_vicreg_weighs_its_terms_by_the_parameters(values: Any) -> None:
    weights = {"invariance": 2.0, "variance": 3.0, "covariance": 4.0}
    params = Params.model_validate(merged(values, {"contrastive": {"objective": "vicreg", "vicreg": weights}}))
    model = build_contrastive(build_encoder(params.model, params.data), params.contrastive).eval()
    views = [View(torch.randn(6, 1, 8, 8)) for _ in range(2)]
    z1, z2 = (model.projector(model.encoder(view.images)) for view in views)
    assert torch.allclose(model(*views, 0.5), vicreg_loss(z1, z2, params.contrastive.vicreg))


@pytest.mark.parametrize(("mask_ratio", "seen"), [(0.0, None), (0.5, 8), (0.75, 4)])
def test_model_is_given_the_kept_patches_and_the_progress(
    mask_ratio: float, seen: int | None, values: Any, prepared: LabelledImages, tmp_path: Path
) -> None:
    session = session_of(values, prepared, tmp_path, mask_ratio=mask_ratio)
    model = build_contrastive(build_encoder(session.params.model, session.params.data), session.params.contrastive)
    given: list[tuple[View, View, float, None]] = []
    model.forward = lambda *args: given.append(args) or torch.zeros(())  # type: ignore[assignment,func-returns-value]
    batches = contrastive_crops(prepared, session.params.contrastive, 5, Stream(0, "cl"))
    loss_of = contrastive_loss_of("cl", model, batches, 40, session)
    crops = torch.zeros(5, 2, 1, 8, 8, dtype=torch.uint8)
    for step in (10, 10, 11):
        loss_of(Batch.whole(crops, step))
    assert [progress for _, _, progress, _ in given] == [0.25, 0.25, 0.275]
    for view1, view2, _, small in given:
        assert small is None
        for view in (view1, view2):
            assert (view.ids_keep is None) if seen is None else (view.ids_keep.shape == (5, seen))  # type: ignore[union-attr]
    if seen is not None:
        kept = [view.ids_keep.sort().values for views in given for view in views[:2]]  # type: ignore[union-attr]
        assert torch.equal(kept[0], kept[2])  # the same step again
        assert not torch.equal(kept[0], kept[1])  # the other view
        assert not torch.equal(kept[0], kept[4])  # the next step


def test_momentum_moves_along_its_cosine_step_by_step(
    values: Any, prepared: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    update = MoCo.update_momentum_encoder
    monkeypatch.setattr(MoCo, "update_momentum_encoder", lambda self, m: used.append(m) or update(self, m))
    session = session_of(values, prepared, tmp_path)
    pretrain_cl(session)
    steps = session.params.cl.epochs * (len(prepared.pretraining_ids) // session.params.cl.batch_size)
    assert used == pytest.approx([momentum_at(i / steps, session.params.contrastive.momentum) for i in range(steps)])


def test_optimizers_are_the_papers(
    values: Any, prepared: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW with the betas of MAE's table 8, and with AdamW's own for MoCo v3; rates scaled by batch / 256."""
    given: list[tuple[Any, ...]] = []
    for module in (cl, mim):
        monkeypatch.setattr(module, "fit_arm", lambda *args: given.append(args))
    session = session_of(values, prepared, tmp_path)
    pretrain_mim(session)
    pretrain_cl(session)
    assert [betas for _, _, betas, _, _ in given] == [(0.9, 0.95), (0.9, 0.999)]
    assert all(rate == pytest.approx(8e-3 * 64 / 256) for _, rates, _, _, _ in given for rate in rates.values())
