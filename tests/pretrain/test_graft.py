"""What each graft policy does to blocks, learning rates and loss."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from arrivals import saved_encoder
from conftest import FOREIGN, Silent, merged
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor

from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.models.encoder_folder import load_encoder
from lgp.models.moco import MoCo
from lgp.models.vit import build_encoder
from lgp.params.file import Params
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.graft import build_graft, decayed_rates, graft_rates, l1_penalty, pretrain_graft, stage_rates
from lgp.training.resume_states import StateStore


def papers_rate(name: str, depth: int) -> float:
    """The rule of LGP, section 3.3, for three groups."""
    parts = name.removeprefix("momentum_").split(".")  # a copy has its learner's, which nothing reads
    high = parts[0] != "encoder" or parts[1] == "norm" or (parts[1] == "blocks" and int(parts[2]) >= depth * 2 // 3)
    return 1.5e-4 if high else 1.5e-5


def small_moco(depth: int) -> MoCo:
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=depth, embed_dim=12)
    return MoCo(encoder, 8, 8, 8, temperature=0.2, momentum=0.99)


@pytest.mark.parametrize("depth", [12, 24])
def test_stage_rates_are_the_papers(depth: int) -> None:
    model = small_moco(depth)
    rates = stage_rates(model.roles(), depth, [1.5e-5, 1.5e-5, 1.5e-4])
    assert rates == {name: papers_rate(name, depth) for name, _ in model.named_parameters()}
    assert {"projector.0.weight", "predictor.0.weight", "momentum_encoder.blocks.0.norm1.bias"} <= rates.keys()


@pytest.mark.parametrize("depth", [12, 24])
def test_decayed_rates_are_timms_for_an_encoder_with_a_classifier(depth: int) -> None:
    classifier = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=depth)
    rates = decayed_rates(small_moco(depth).roles(), depth, 0.1, 0.65)
    scales = {id(p): g["lr_scale"] for g in param_groups_layer_decay(classifier, layer_decay=0.65) for p in g["params"]}
    for name, parameter in classifier.named_parameters():
        if name.startswith("head."):
            assert rates["projector.0.weight"] == pytest.approx(0.1 * scales[id(parameter)])
            continue
        # timm counts the final norm to the last block, BEiT and LGP to the head
        scale = 1.0 if name.startswith("norm.") else scales[id(parameter)]
        assert rates[f"encoder.{name}"] == pytest.approx(0.1 * scale), name
    assert rates["projector.0.weight"] == 0.1


def test_policies_give_the_rates_they_name(params: Params, values: Any) -> None:
    encoder = build_encoder(params.model, params.data)
    model = build_graft(encoder, params)
    roles, peak = model.roles(), 64 / 256
    by_stage = Params.model_validate(merged(values, {"graft": {"stage_lr": {"base_lrs": ["1e-3", "2e-3", "4e-3"]}}}))
    expected = stage_rates(roles, 3, [1e-3 * peak, 2e-3 * peak, 4e-3 * peak])
    assert graft_rates(model, by_stage.graft, 3) == pytest.approx(expected)
    policy = {"policy": "layer_decay", "layer_decay": {"base_lr": "1e-3", "decay": 0.5}}
    decayed = Params.model_validate(merged(values, {"graft": policy}))
    assert graft_rates(model, decayed.graft, 3) == pytest.approx(decayed_rates(roles, 3, 1e-3 * peak, 0.5))


@pytest.fixture
def mim_encoder(tmp_path: Path, params: Params, prepared: LabelledImages) -> Path:
    return saved_encoder(tmp_path / "mim" / "encoder", params, prepared, 1)


@pytest.fixture
def cl_encoder(tmp_path: Path, params: Params, prepared: LabelledImages) -> Path:
    return saved_encoder(tmp_path / "cl" / "encoder", params, prepared, 2)


def grafted(
    tmp_path: Path, values: Any, prepared: LabelledImages, start: Path, upper: Path, **graft: Any
) -> Pretrained:
    params = Params.model_validate(merged(values, {"graft": graft}))
    return pretrain_graft(Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent()), start, upper)


def changed(encoder: VisionTransformer, start: Path) -> set[str]:
    """Return the parts of an encoder that are no longer bitwise what they were."""
    before = load_encoder(start).state_dict()
    names = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    return {".".join(name.split(".")[: 2 if name.startswith("blocks.") else 1]) for name in names}


def test_zero_rates_keep_the_lower_blocks_bitwise(
    tmp_path: Path, values: Any, prepared: LabelledImages, mim_encoder: Path
) -> None:
    rates = {"stage_lr": {"base_lrs": [0.0, 0.0, 8e-3]}}
    result = grafted(tmp_path, values, prepared, mim_encoder, mim_encoder, **rates)
    assert changed(result.model.encoder, mim_encoder) == {"blocks.2", "norm"}


@pytest.mark.parametrize("lower_blocks", [0, 2])
def test_freeze_keeps_embeddings_and_lower_blocks_bitwise_also_in_the_momentum_encoder(
    tmp_path: Path, values: Any, prepared: LabelledImages, mim_encoder: Path, lower_blocks: int
) -> None:
    values["contrastive"]["freeze_patch_embed"] = False  # the policy freezes it too
    policy = {"policy": ["stage_lr", "freeze"], "freeze": {"lower_blocks": lower_blocks}}
    result = grafted(tmp_path, values, prepared, mim_encoder, mim_encoder, **policy)
    upper = {f"blocks.{i}" for i in range(lower_blocks, 3)} | {"norm"}
    assert changed(result.model.encoder, mim_encoder) == upper
    assert changed(result.model.momentum_encoder, mim_encoder) == upper  # type: ignore[arg-type]
    still = {name for name, share in result.checks.metrics.items() if name.startswith("moved/") and not share}
    assert still == {"moved/embed", *(f"moved/block{i}" for i in range(lower_blocks))}


def test_l1_is_the_weighted_sum_of_distances(params: Params) -> None:
    encoder = build_encoder(params.model, params.data).double()
    penalty = l1_penalty(encoder, 1, 0.25)
    assert penalty().item() == 0
    before = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = sum(
        abs(a - b)
        for (name, p), q in zip(encoder.named_parameters(), before.parameters(), strict=True)
        if name.startswith(("cls_token", "patch_embed", "blocks.0."))
        for a, b in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True)
    )
    assert penalty().item() == pytest.approx(0.25 * expected, rel=1e-6)
    penalty().backward()
    assert encoder.blocks[1].attn.qkv.weight.grad is None
    gradient: Tensor = encoder.blocks[0].attn.qkv.weight.grad
    assert torch.equal(gradient.abs(), torch.full_like(gradient, 0.25))


def test_large_l1_weight_keeps_the_regularized_blocks_where_they_were(
    tmp_path: Path, values: Any, prepared: LabelledImages, mim_encoder: Path
) -> None:
    policy = {"policy": ["stage_lr", "l1"], "l1": {"lower_blocks": 2, "weight": 1e4}, "weight_decay": 0.0}
    policy |= {"stage_lr": {"base_lrs": [1e-3]}, "epochs": 20}
    encoder = grafted(tmp_path, values, prepared, mim_encoder, mim_encoder, **policy).model.encoder
    before = load_encoder(mim_encoder).state_dict()
    distance = {name: (t - before[name]).abs().max().item() for name, t in encoder.state_dict().items()}
    assert max(d for name, d in distance.items() if name.startswith(("cls_token", "blocks.0.", "blocks.1."))) < 1e-3
    assert distance["blocks.2.mlp.fc1.weight"] > 2e-3


def test_scratch_end_starts_upper_blocks_and_norm_anew(
    tmp_path: Path, values: Any, prepared: LabelledImages, mim_encoder: Path
) -> None:
    policy = {"policy": ["stage_lr", "scratch_end"], "scratch_end": {"lower_blocks": 1}}
    result = grafted(tmp_path, values, prepared, mim_encoder, mim_encoder, **policy, stage_lr={"base_lrs": [1e-9]})
    before = load_encoder(mim_encoder).state_dict()
    far = {n for n, t in result.model.encoder.state_dict().items() if (t - before[n]).abs().max() > 1e-3}
    assert {".".join(n.split(".")[:2]) for n in far} == {"blocks.1", "blocks.2", "norm.weight"}


def test_cl_end_takes_upper_blocks_and_norm_from_the_other_arm(
    tmp_path: Path, values: Any, prepared: LabelledImages, mim_encoder: Path, cl_encoder: Path
) -> None:
    policy = {"policy": ["stage_lr", "cl_end"], "cl_end": {"lower_blocks": 2}, "end": "cl"}
    result = grafted(tmp_path, values, prepared, mim_encoder, cl_encoder, **policy, stage_lr={"base_lrs": [1e-9]})
    lower, upper = load_encoder(mim_encoder).state_dict(), load_encoder(cl_encoder).state_dict()
    for name, tensor in result.model.encoder.state_dict().items():
        source = upper if name.startswith(("blocks.2.", "norm.")) else lower
        assert torch.allclose(tensor, source[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": ["freeze"]}, "policy freeze must name exactly one of stage_lr and layer_decay"),
        ({"policy": ["stage_lr", "layer_decay"]}, "must name exactly one of stage_lr and layer_decay"),
        ({"policy": "stage_lr, freeze"}, "graft.policy: 'stage_lr, freeze' is not valid"),
        ({"policy": ["stage_lr", "scratch_end", "cl_end"]}, "policy names both scratch_end and cl_end"),
        ({"policy": ["stage_lr", "cl_end"]}, "takes the upper blocks from end, which is start, mim: set it to cl"),
        ({"end": "cl"}, "end cl is read by the policy cl_end only"),
        ({"start": "graft", "end": "graft"}, "start and end are arms to graft on, never graft itself"),
        (
            {"policy": ["stage_lr", "freeze"], "freeze": {"lower_blocks": 9}},
            "graft.freeze.lower_blocks 9 is more than model.depth 3",
        ),
        (
            {
                "policy": ["stage_lr", "l1", "scratch_end"],
                "l1": {"lower_blocks": 2},
                "scratch_end": {"lower_blocks": 1},
            },
            "l1.lower_blocks 2 reaches into the blocks that do not start from mim, from 1 on",
        ),
        (
            {"policy": ["stage_lr", "l1", "freeze"], "l1": {"lower_blocks": 1}, "freeze": {"lower_blocks": 1}},
            "l1 covers only frozen blocks: raise l1.lower_blocks, or drop l1 from policy",
        ),
        ({"policy": ["layer_decay"], "layer_decay": None}, "policy names layer_decay, but graft has no section"),
    ],
)
def test_policies_that_contradict_are_refused(
    values: Any, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    import yaml

    from lgp.params.file import load_params

    (tmp_path / "params.yaml").write_text(yaml.safe_dump(merged(values, {"graft": change})))
    with pytest.raises(LgpError) as error:
        load_params(tmp_path / "params.yaml")
    assert message in str(error.value)


def test_encoder_of_other_dimensions_is_refused(
    tmp_path: Path, values: Any, prepared: LabelledImages, mim_encoder: Path
) -> None:
    params = Params.model_validate(merged(values, {"model": {"width": 32}}))
    session = Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())
    with pytest.raises(LgpError, match=r"was trained with .*'embed_dim': 16.*train it anew"):
        pretrain_graft(session, mim_encoder, mim_encoder)


@pytest.mark.parametrize("foreign", ["start", "end"])
def test_encoder_of_images_with_other_statistics_is_refused(
    foreign: str, tmp_path: Path, values: Any, params: Params, prepared: LabelledImages, mim_encoder: Path
) -> None:
    other = saved_encoder(tmp_path / "imported" / "encoder", params, prepared.normalized_by(FOREIGN), 1)
    start, end = (other, mim_encoder) if foreign == "start" else (mim_encoder, other)
    policy = {"policy": ["stage_lr", "cl_end"], "cl_end": {"lower_blocks": 2}, "end": "cl"}
    with pytest.raises(LgpError) as error:
        grafted(tmp_path, values, prepared, start, end, **policy)
    assert f"trained on images of {FOREIGN}, the prepared ones have {prepared.normalization}" in str(error.value)
    assert "set data.mean to [0.9] and data.std to [0.1], and run `lgp prepare` again" in str(error.value)
