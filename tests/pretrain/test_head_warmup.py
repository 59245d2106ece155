"""Head warm-up: heads learn on the frozen encoder, then everything learns; and k-NN inside the head."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import merged

from lgp.data.labels import LabelledImages
from lgp.features.extraction import extract, features_of
from lgp.features.knn import knn_predict
from lgp.features.online_knn import OnlineKnn
from lgp.models.contrastive import build_contrastive
from lgp.models.encoder_folder import load_encoder
from lgp.params.file import Params
from lgp.params.run import OnlineKnnParams
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.graft import pretrain_graft
from lgp.pretrain.head_warmup import frozen_encoder, knn_in_head
from lgp.pretrain.plan import Machine, plan_stage, stage_cost
from lgp.training.resume_states import StateStore

CPU = torch.device("cpu")


class Notes:
    """An observer that can stop a training after a number of epochs."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.epochs: list[dict[str, float]] = []
        self.stop_after = stop_after

    def log_epoch(self, values: dict[str, float]) -> None:
        self.epochs.append(values)
        if len(self.epochs) == self.stop_after:
            raise KeyboardInterrupt


def params_of(values: dict[str, Any], heads: int, **contrastive: Any) -> Params:
    graft = {"start": "mim", "epochs": 2, "warmup_epochs": 1, "head_warmup_epochs": heads}
    run = {"save_every_s": 1e-6, "accept": ["graft"]}
    return Params.model_validate(merged(values, {"graft": graft, "run": run, "contrastive": contrastive}))


def grafted(
    params: Params, data: LabelledImages, start: Path, folder: Path, told: Notes, labelled: bool = True
) -> Pretrained:
    session = Session(data, params, StateStore(folder, "code"), told, data if labelled else None)
    return pretrain_graft(session, start, start)


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("objective", ["mocov3", "vicreg"])
def test_only_the_heads_learn_before_the_training(
    objective: str,
    values: dict[str, Any],
    prepared: LabelledImages,
    encoder_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    after: list[Any] = []
    monkeypatch.setattr("lgp.pretrain.arm.knn_in_head", lambda model, *_: after.append(copy.deepcopy(model)) or {})
    start = load_encoder(encoder_folder).state_dict()
    params = params_of(values, 3, objective=objective)
    result = grafted(params, prepared, encoder_folder, tmp_path, Notes())
    (warmed,) = after
    assert equal(start, warmed.encoder.state_dict())
    if objective == "mocov3":
        assert equal(start, warmed.momentum_encoder.state_dict())
    learning = {name for name, p in warmed.encoder.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in result.model.encoder.named_parameters() if p.requires_grad}
    assert learning
    new = grafted(params_of(values, 0, objective=objective), prepared, encoder_folder, tmp_path / "0", Notes())
    assert not equal(new.model.heads(), result.model.heads())
    assert not equal(start, result.model.encoder.state_dict())
    pairs = zip(first_projector(params, encoder_folder), warmed.projector.parameters(), strict=True)
    assert not any(torch.equal(before, after) for before, after in pairs)


def first_projector(params: Params, folder: Path) -> list[torch.Tensor]:
    """Return the weights of the projector as a graft begins with them."""
    from lgp.compute.randomness import seeded

    with seeded(params.seed, "graft/init"):
        return list(build_contrastive(load_encoder(folder), params.contrastive).projector.parameters())


def test_epochs_of_the_heads_are_logged_apart_and_count_in_the_compute(
    values: dict[str, Any], prepared: LabelledImages, encoder_folder: Path, tmp_path: Path
) -> None:
    told, alone = Notes(), Notes()
    result = grafted(params_of(values, 3), prepared, encoder_folder, tmp_path / "a", told)
    without = grafted(params_of(values, 0), prepared, encoder_folder, tmp_path / "b", alone)
    assert [values["epoch"] for values in told.epochs] == [1, 2, 3, 1, 2]
    assert {key for values in told.epochs[:3] for key in values} == {
        "epoch",
        "heads/loss",
        "heads/grad_norm",
        "heads/lr",
    }
    assert told.epochs[2]["heads/loss"] < told.epochs[0]["heads/loss"]
    assert all("train/loss" in values for values in told.epochs[3:])
    assert len(result.progression.history) == 2
    # forward and backward of the heads, and only forward of the encoder: less than three epochs of the training
    assert 1 < result.progression.train_flops / without.progression.train_flops < 1 + 3 / 2
    assert {
        "heads/knn_encoder",
        "heads/knn_layer1",
        "heads/knn_layer2",
        "heads/knn_layer3",
    } <= result.checks.metrics.keys()
    assert not any(key.startswith("heads/") for key in without.checks.metrics)


@pytest.mark.parametrize(
    ("objective", "stop_after"),  # in the warm-up of the heads, at its end, in the training
    [("mocov3", 1), ("mocov3", 3), ("mocov3", 4), ("refine", 1), ("refine", 4), ("swav", 4)],
)
def test_stopped_and_continued_is_uninterrupted(
    objective: str, stop_after: int, values: Any, prepared: LabelledImages, encoder_folder: Path, tmp_path: Path
) -> None:
    small_views = None if objective == "mocov3" else {"count": 2, "size": 4}
    params, whole = params_of(values, 3, objective=objective, small_views=small_views), Notes()
    expected = grafted(params, prepared, encoder_folder, tmp_path / "a", whole)
    with pytest.raises(KeyboardInterrupt):
        grafted(params, prepared, encoder_folder, tmp_path / "b", Notes(stop_after))
    told = Notes()
    result = grafted(params, prepared, encoder_folder, tmp_path / "b", told)
    assert equal(expected.model.state_dict(), result.model.state_dict())
    assert told.epochs == whole.epochs
    assert expected.checks.metrics == result.checks.metrics


def test_without_labels_the_heads_learn_and_nothing_is_measured(
    values: dict[str, Any], prepared: LabelledImages, encoder_folder: Path, tmp_path: Path
) -> None:
    params = params_of(values, 1)
    with_it = grafted(params, prepared, encoder_folder, tmp_path / "a", Notes())
    without = grafted(params, prepared, encoder_folder, tmp_path / "b", Notes(), labelled=False)
    assert equal(with_it.model.state_dict(), without.model.state_dict())
    assert not any(key.startswith("heads/") for key in without.checks.metrics)


def test_knn_in_the_head_is_of_each_layers_output(
    prepared: LabelledImages, params: Params, encoder_folder: Path
) -> None:
    model = build_contrastive(load_encoder(encoder_folder), params.contrastive)
    settings = OnlineKnnParams(every_epochs=1, train_images=10**6, val_images=10**6)
    found = knn_in_head(model, OnlineKnn(prepared, settings), CPU)
    ids = {split: prepared.ids(split) for split in ("train", "val")}
    x = {split: torch.from_numpy(extract(features_of(model.encoder, CPU), prepared, i)) for split, i in ids.items()}
    linear1, norm1, relu1, linear2, norm2, relu2, linear3, norm3 = model.projector.eval()

    def top1(of: dict[str, torch.Tensor]) -> float:
        arrays = {split: t.detach().numpy() for split, t in of.items()}
        labels = prepared.labels
        predicted = knn_predict(arrays["train"], labels[ids["train"]], arrays["val"], 10, 20, 0.07)
        return round(100 * float(np.mean(predicted == labels[ids["val"]])), 2)

    first = {split: relu1(norm1(linear1(t))) for split, t in x.items()}
    second = {split: relu2(norm2(linear2(t))) for split, t in first.items()}
    third = {split: norm3(linear3(t)) for split, t in second.items()}
    expected = {"encoder": x, "layer1": first, "layer2": second, "layer3": third}
    assert found == {f"heads/knn_{name}": top1(of) for name, of in expected.items()}


def test_what_was_frozen_before_stays_frozen(params: Params, encoder_folder: Path) -> None:
    model = build_contrastive(load_encoder(encoder_folder), params.contrastive)
    model.encoder.blocks[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with frozen_encoder(model):
        assert not any(p.requires_grad for p in model.encoder.parameters())
        assert any(p.requires_grad for p in model.projector.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_plan_counts_the_epochs_of_the_heads(values: dict[str, Any]) -> None:
    with_it, without, machine = params_of(values, 4), params_of(values, 0), Machine(1, 80, 2.0)
    whole, heads = stage_cost("graft", with_it), stage_cost("graft", with_it, heads_only=True)
    assert heads.flops_per_image < 0.6 * whole.flops_per_image
    one, other = (plan_stage("graft", params, 640, machine) for params in (with_it, without))
    assert one.steps == 3 * other.steps
    per_step = whole.flops_per_image * 64 / 2e12 / 3600
    assert one.hours - other.hours == pytest.approx(
        per_step * heads.flops_per_image / whole.flops_per_image * 2 * other.steps
    )
