"""The paper's controls: what they sum, and what they start from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from arrivals import saved_encoder
from conftest import FOREIGN, Silent, merged
from test_graft import changed

from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch
from lgp.errors import LgpError
from lgp.models.joint import Joint
from lgp.params.file import Params
from lgp.pretrain import controls
from lgp.pretrain.arm import Objective, Session
from lgp.pretrain.controls import pretrain_joint, pretrain_reverse
from lgp.training.resume_states import StateStore


@pytest.fixture
def session(tmp_path: Path, params: Params, prepared: LabelledImages) -> Session:
    return Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())


def test_joint_sums_both_losses_on_one_encoder(session: Session, monkeypatch: pytest.MonkeyPatch, values: Any) -> None:
    weighted = Params.model_validate(merged(values, {"joint": {"mim_weight": 0.5}}))
    session = Session(session.data, weighted, session.store, session.observer)
    given: list[Objective] = []
    fit = controls.fit_arm
    monkeypatch.setattr(controls, "fit_arm", lambda objective, *rest: given.append(objective) or fit(objective, *rest))
    result = pretrain_joint(session)
    (objective,) = given
    model = objective.model
    assert isinstance(model, Joint)
    assert model is result.model
    assert model.contrastive.encoder is model.mae.encoder is model.encoder
    model.eval()
    total = session.params.joint.epochs * objective.crops.steps_per_epoch  # type: ignore[union-attr]
    batch = Batch.whole(objective.crops[3], total)
    contrastive = controls.contrastive_loss_of("joint", model.contrastive, objective.crops, total, session)(batch)
    masked = controls.masked_loss_of("joint/mim", model.mae, session)(batch)
    assert torch.allclose(objective.loss_of(batch), contrastive + 0.5 * masked, rtol=1e-6)
    assert {
        "moved/block0",
        "moved/heads",
        "moved/momentum_encoder",
        "moved/momentum_projector",
    } <= result.checks.metrics.keys()


def test_reverse_continues_from_the_contrastive_encoder(
    tmp_path: Path, session: Session, prepared: LabelledImages, values: Any
) -> None:
    start = saved_encoder(tmp_path / "cl" / "encoder", session.params, prepared, 2)
    params = Params.model_validate(merged(values, {"reverse": {"base_lrs": [0.0, 0.0, 8e-3]}}))
    result = pretrain_reverse(Session(prepared, params, session.store, session.observer), start)
    assert changed(result.model.encoder, start) == {"blocks.2", "norm"}


def test_reverse_on_an_encoder_of_other_images_is_refused(
    tmp_path: Path, session: Session, prepared: LabelledImages
) -> None:
    start = saved_encoder(tmp_path / "cl" / "encoder", session.params, prepared.normalized_by(FOREIGN), 2)
    with pytest.raises(LgpError, match=r"was trained on images of mean \[0\.9\], std \[0\.1\]"):
        pretrain_reverse(session, start)
