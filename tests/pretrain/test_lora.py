"""The policy `lora`: what learns, at which rate, from which start, and what is published."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from arrivals import saved_encoder
from conftest import Silent, merged
from torch import Tensor

from lgp.compute.interruption import Interrupted, Interruption
from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.models.encoder_folder import load_encoder, save_encoder
from lgp.models.low_rank import LowRankQkv
from lgp.models.vit import View, build_encoder, features_of_view
from lgp.params.file import Params, check_values
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.graft import build_graft, graft_rates, pretrain_graft
from lgp.pretrain.plan import graft_rates_by_part, stage_cost
from lgp.training.loop import Trainer
from lgp.training.optimizer import parameter_groups
from lgp.training.resume_states import StateStore

LORA = {"rank": 4, "alpha": 8, "free_blocks": 1}
POLICY = {"policy": ["layer_decay", "lora"], "layer_decay": {"base_lr": 0.02, "decay": 0.5}, "lora": LORA}


def with_lora(values: dict[str, Any], **graft: Any) -> Params:
    return Params.model_validate(merged(values, {"graft": merged(POLICY, graft)}))


@pytest.fixture
def start(tmp_path: Path, params: Params, prepared: LabelledImages) -> Path:
    return saved_encoder(tmp_path / "mim" / "encoder", params, prepared, 1)


def grafted(params: Params, prepared: LabelledImages, folder: Path, start: Path, **session: Any) -> Pretrained:
    return pretrain_graft(Session(prepared, params, StateStore(folder, "code"), Silent(), **session), start, start)


def images_of(prepared: LabelledImages) -> Tensor:
    return prepared.normalize(prepared.whole(prepared.ids("val")[:16]))


def test_what_learns_is_free_blocks_norms_and_updates(values: dict[str, Any]) -> None:
    params = with_lora(values)
    model = build_graft(build_encoder(params.model, params.data), params)
    learning = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    held = {
        f"blocks.{block}.{name}"
        for block in (0, 1)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.qkv.down", "attn.qkv.up")
    }
    free = {f"blocks.2.{name}" for name, _ in model.encoder.blocks[2].named_parameters()}
    assert learning == held | free | {"norm.weight", "norm.bias"}
    assert [type(block.attn.qkv) is LowRankQkv for block in model.encoder.blocks] == [True, True, False]
    assert model.encoder.blocks[0].attn.qkv.down.shape == (2, 4, 16)
    assert model.encoder.blocks[0].attn.qkv.scale == 2
    assert not any(p.requires_grad for p in model.momentum_encoder.parameters())


def test_norm_before_the_blocks_learns_and_layer_scale_does_not(values: dict[str, Any]) -> None:
    encoder = timm.create_model(
        "vit_small_patch16_224", img_size=8, patch_size=2, embed_dim=16, depth=3, num_heads=2, num_classes=0,
        pre_norm=True, init_values=1e-5, qk_norm=True,
    )  # fmt: skip
    built = build_graft(encoder, with_lora(values)).encoder
    held = ("norm_pre", "blocks.0.")
    learning = {name for name, p in built.named_parameters() if p.requires_grad and name.startswith(held)}
    assert {"norm_pre.weight", "blocks.0.attn.q_norm.weight", "blocks.0.attn.k_norm.weight"} <= learning
    assert not any("ls1" in name or "ls2" in name or "mlp" in name for name in learning)


@pytest.mark.parametrize("objective", ["mocov3", "simclr", "vicreg"])
def test_features_at_the_start_are_exactly_those_of_the_start(
    objective: str, values: dict[str, Any], prepared: LabelledImages, start: Path
) -> None:
    values = merged(values, {"contrastive": {"objective": objective}})
    model = build_graft(load_encoder(start), with_lora(values))
    images = images_of(prepared)
    with torch.no_grad():
        expected = load_encoder(start)(images)
        assert torch.equal(model.encoder(images), expected)
        if objective == "mocov3":
            assert torch.equal(model.momentum_encoder(images), expected)
            kept = torch.arange(8).expand(16, 8)
            masked = features_of_view(load_encoder(start), View(images, kept))
            assert torch.equal(features_of_view(model.encoder, View(images, kept)), masked)


def test_groups_have_the_rates_of_their_blocks_and_updates_decay(values: dict[str, Any]) -> None:
    """Rates are those of layer_decay; A and B decay, so that weight decay draws the merged weights to their start."""
    params = with_lora(values, weight_decay=0.03)
    model = build_graft(build_encoder(params.model, params.data), params)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, graft_rates(model, params.graft, 3), params.graft.weight_decay)
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    peak = 0.02 * 64 / 256
    for block, rate in ((0, peak / 8), (1, peak / 4)):
        for update in ("down", "up"):
            assert found[f"encoder.blocks.{block}.attn.qkv.{update}"] == (rate, 0.03)
        assert found[f"encoder.blocks.{block}.norm1.weight"] == (rate, 0.0)
    assert found["encoder.blocks.2.attn.qkv.weight"] == (peak / 2, 0.03)
    assert found["projector.0.weight"] == (peak, 0.03)
    assert not any(name.startswith("encoder.blocks.0.mlp") for name in found)


def test_published_encoder_is_plain_timm_with_the_features_of_the_trained_one(
    tmp_path: Path, values: dict[str, Any], prepared: LabelledImages, start: Path
) -> None:
    params, kept = with_lora(values), []

    def fit(trainer: Trainer) -> Any:
        progression = trainer.fit()
        kept.append(copy.deepcopy(trainer.model))
        return progression

    result = grafted(params, prepared, tmp_path / "state", start, fit=fit)
    (trained,), images = kept, images_of(prepared)
    folder = tmp_path / "graft" / "encoder"
    save_encoder(folder, result.model.encoder, params.model, params.data, prepared.normalization, {})
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    before = load_encoder(start).eval()
    with torch.no_grad():
        features, expected = plain(images), trained.encoder.eval()(images)
        assert torch.allclose(features, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        assert not torch.allclose(features, before(images), atol=1e-2)
        copied = result.model.momentum_encoder.eval()  # type: ignore[operator]
        assert torch.allclose(copied(images), trained.momentum_encoder.eval()(images), atol=1e-5)
    assert result.model.encoder.state_dict().keys() == before.state_dict().keys()
    assert not result.checks.faults


def test_held_weights_keep_their_bytes_and_an_update_has_its_rank(
    tmp_path: Path, values: dict[str, Any], prepared: LabelledImages, start: Path
) -> None:
    result = grafted(with_lora(values, epochs=4), prepared, tmp_path / "state", start)
    before = load_encoder(start).state_dict()
    for encoder in (result.model.encoder, result.model.momentum_encoder):
        after = encoder.state_dict()  # type: ignore[operator]
        for block in (0, 1):
            weights = [weights[f"blocks.{block}.attn.qkv.weight"].double() for weights in (before, after)]
            queries, keys, values_ = (weights[1] - weights[0]).chunk(3)
            assert not keys.any()
            for update in (queries, values_):
                assert int((torch.linalg.svdvals(update) > 1e-6).sum()) == 4  # rounding in single precision: 3e-8
        moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
        assert {name for name in moved if name.startswith(("blocks.0.", "blocks.1."))} == {
            f"blocks.{block}.{name}"
            for block in (0, 1)
            for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.qkv.weight")
        }
        assert not moved & {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_momentum_averages_the_updates(values: dict[str, Any], prepared: LabelledImages, start: Path) -> None:
    model = build_graft(load_encoder(start), with_lora(values))
    learnt, copied = (e.blocks[0].attn.qkv for e in (model.encoder, model.momentum_encoder))
    with torch.no_grad():
        learnt.up.normal_()
        learnt.down.normal_()
    expected = {name: 0.9 * getattr(copied, name) + 0.1 * getattr(learnt, name) for name in ("up", "down")}
    frozen = copied.weight.clone()
    model.update_momentum_encoder(0.9)
    assert all(torch.allclose(getattr(copied, name), value, atol=1e-7) for name, value in expected.items())
    assert torch.equal(copied.weight, frozen)
    assert torch.equal(copied.weight, learnt.weight)


def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, values: dict[str, Any], prepared: LabelledImages, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = with_lora(values)
    whole = grafted(params, prepared, tmp_path / "whole", start)
    with monkeypatch.context() as patch:
        trainers: list[Trainer] = []
        patch.setattr(Interruption, "asked", lambda _: trainers[0].now.step == 4)
        with pytest.raises(Interrupted):
            grafted(params, prepared, tmp_path / "state", start, fit=lambda t: (trainers.append(t), t.fit())[1])
    state = StateStore(tmp_path / "state", "code").read()
    assert state is not None
    kept = state["model"]
    assert kept["encoder.blocks.0.attn.qkv.up"].any()
    assert "momentum_encoder.blocks.1.attn.qkv.down" in kept
    resumed = grafted(params, prepared, tmp_path / "state", start)
    assert resumed.progression.history == whole.progression.history
    of_whole = whole.model.state_dict()
    assert all(torch.equal(tensor, of_whole[name]) for name, tensor in resumed.model.state_dict().items())


def test_plan_counts_the_weights_that_learn(values: dict[str, Any]) -> None:
    params = with_lora(values)
    parts = {part.part: part for part in graft_rates_by_part(params)}
    assert (parts["block0"].decayed, parts["block0"].undecayed) == (2 * 2 * 4 * 16, 4 * 16)
    assert parts["block0"].base_lr == pytest.approx(0.02 / 8)
    assert parts["embed"].decayed == 0
    free = Params.model_validate(merged(values, {"graft": {"policy": ["layer_decay"]}}))
    cheap, dear = stage_cost("graft", params), stage_cost("graft", free)
    assert cheap.trained < dear.trained
    assert cheap.flops_per_image < dear.flops_per_image


def test_freeze_leaves_its_blocks_without_updates(
    tmp_path: Path, values: dict[str, Any], prepared: LabelledImages, start: Path
) -> None:
    params = with_lora(values, policy=["layer_decay", "lora", "freeze"], freeze={"lower_blocks": 1})
    result = grafted(params, prepared, tmp_path / "state", start)
    before = load_encoder(start).state_dict()
    moved = {n for n, tensor in result.model.encoder.state_dict().items() if not torch.equal(tensor, before[n])}
    assert {name.split(".")[1] for name in moved if name.startswith("blocks.")} == {"1", "2"}
    assert "blocks.1.attn.qkv.weight" in moved
    assert "blocks.1.mlp.fc1.weight" not in moved
    assert not result.checks.faults


def test_updates_hold_blocks_of_another_arm_too_and_blocks_that_start_anew_are_free(
    tmp_path: Path, values: dict[str, Any], params: Params, prepared: LabelledImages, start: Path
) -> None:
    end = saved_encoder(tmp_path / "cl" / "encoder", params, prepared, 2)
    both = with_lora(values, policy=["layer_decay", "lora", "cl_end"], cl_end={"lower_blocks": 1}, end="cl")
    session = Session(prepared, both, StateStore(tmp_path / "a", "code"), Silent())
    encoder = pretrain_graft(session, start, end).model.encoder
    assert torch.equal(encoder.blocks[0].mlp.fc1.weight, load_encoder(start).blocks[0].mlp.fc1.weight)
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, load_encoder(end).blocks[1].mlp.fc1.weight)
    anew = with_lora(values, policy=["layer_decay", "lora", "scratch_end"], scratch_end={"lower_blocks": 2})
    assert not grafted(anew, prepared, tmp_path / "b", start).checks.faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": None}, "policy names lora, but graft has no section lora: add it"),
        ({"policy": ["lora"]}, "must name exactly one of stage_lr and layer_decay"),
        ({"policy": ["layer_decay", "lora", "l1"]}, "policy names both l1 and lora"),
        ({"lora": {"rank": 16}}, "graft.lora.rank 16 is no low rank at model.width 16: lower it"),
        ({"lora": {"rank": 0}}, "graft.lora.rank: 0 is not valid"),
        ({"lora": {"alpha": 0}}, "graft.lora.alpha: 0 is not valid"),
        ({"lora": {"free_blocks": 3}}, "graft.lora.free_blocks 3 and 0 frozen blocks leave none of 3"),
        (
            {"policy": ["layer_decay", "lora", "freeze"], "freeze": {"lower_blocks": 2}},
            "graft.lora.free_blocks 1 and 2 frozen blocks leave none of 3 for low-rank updates: lower one of them",
        ),
        (
            {"policy": ["layer_decay", "lora", "scratch_end"], "scratch_end": {"lower_blocks": 1}},
            "scratch_end starts the blocks from 1 on anew, which must learn freely: raise graft.lora.free_blocks 1 to",
        ),
    ],
)
def test_policies_that_lora_contradicts_are_refused(
    values: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(LgpError) as error:
        check_values(merged(values, {"graft": merged(POLICY, change)}), Path("params.yaml"))
    assert message in str(error.value)
