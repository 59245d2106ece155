"""Other plain ViTs of timm as the encoder: each path through the model gives what timm's own forward gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import merged
from made_models import by_timm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.data.normalization import Normalization
from lgp.errors import LgpError
from lgp.evaluate.fine_tuning import build_classifier
from lgp.models.classifier_folder import Classifier, Head, load_classifier, save_classifier
from lgp.models.contrastive import build_contrastive
from lgp.models.encoder_folder import check_encoder_fits, load_encoder, save_encoder
from lgp.models.roles import encoder_roles
from lgp.models.vit import (
    View,
    build_encoder,
    embed,
    encode_tokens,
    features_of_last_blocks,
    features_of_view,
    freeze_pooling,
    init_encoder_as_mae,
    init_encoder_as_moco,
    model_args,
    pooled,
    pooled_by_block,
)
from lgp.params.file import Params
from lgp.pretrain.mim import build_mae

# each has a part that the paper's encoder has not
NAMES = {
    "test_vit": "takes images of any size",
    "test_vit2": "a register, LayerScale, no class token, a norm after pooling",
    "test_vit3": "pooling by attention, which is left out",
    "test_vit4": "RMS norm and no class token",
    "vit_xsmall_patch16_clip_224": "a norm before the blocks, and no bias of patches",
    "vit_tiny_patch16_224": "learned positions",
    "vit_small_patch14_reg4_dinov2": "registers without positions",
}


def params_of(name: str, values: dict[str, Any], size: int = 0) -> Params:
    patch = 14 if "patch14" in name else 16
    changes = {"data": {"channels": 3, "image_size": size or 2 * patch}, "model": {"timm": name}}
    changes |= {"graft": {"stage_lr": {"base_lrs": [1e-4]}}, "reverse": {"base_lrs": [1e-4]}}
    return Params.model_validate(merged({**values, "model": {}}, changes))


@pytest.fixture(params=NAMES)
def chosen(request: pytest.FixtureRequest, values: dict[str, Any]) -> Params:
    return params_of(request.param, values)


def randomised(encoder: VisionTransformer) -> VisionTransformer:
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


@pytest.fixture
def encoder(chosen: Params) -> VisionTransformer:
    return randomised(build_encoder(chosen.model, chosen.data))


def images_for(params: Params, number: int = 3) -> Tensor:
    return torch.randn(number, 3, params.data.image_size, params.data.image_size)


def test_our_paths_are_timms_forward(encoder: VisionTransformer, chosen: Params) -> None:
    images = images_for(chosen)
    tokens = encode_tokens(encoder, embed(encoder, images))
    assert torch.allclose(tokens, encoder.forward_features(images), atol=1e-5)
    assert torch.allclose(pooled(encoder, tokens, "class_token"), encoder(images), atol=1e-5)
    assert torch.allclose(pooled_by_block(encoder, images, "class_token", 1)[:, 0], encoder(images), atol=1e-5)


def test_average_is_of_the_patches_alone(encoder: VisionTransformer, chosen: Params) -> None:
    images = images_for(chosen)
    tokens = encoder.forward_features(images)
    assert tokens.shape[1] == encoder.num_prefix_tokens + 4
    expected = encoder.fc_norm(tokens[:, -4:].mean(dim=1))
    assert torch.allclose(pooled_by_block(encoder, images, "average", 1)[:, 0], expected, atol=1e-5)


def test_features_of_each_of_the_last_blocks_are_those_of_timms_own_tokens(
    encoder: VisionTransformer, chosen: Params
) -> None:
    """Only those of the last block pass the final norm. Without a class token they are the average of the patches."""
    images, depth = images_for(chosen), len(encoder.blocks)
    one = features_of_last_blocks(encoder, View(images), 1)
    assert torch.allclose(one[0], features_of_view(encoder, View(images)), atol=1e-5)
    found = features_of_last_blocks(encoder, View(images), 3)
    after = encoder.forward_intermediates(
        images, indices=[depth - 3, depth - 2], intermediates_only=True, return_prefix_tokens=True, output_fmt="NLC"
    )
    for ours, (patches, prefix) in zip(found, after, strict=False):
        expected = prefix[:, 0] if encoder.global_pool == "token" else patches.mean(dim=1)
        assert torch.allclose(ours, expected, atol=1e-4)
    assert len(found) == 3
    assert torch.allclose(found[-1], encoder(images), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("test_vit", {"dynamic_img_size": False}),
        ("test_vit3", {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": False}),
        ("vit_small_patch14_reg4_dinov2", {}),
    ],
)
def test_changes_of_an_architecture_reach_timm(name: str, changes: dict[str, Any], values: dict[str, Any]) -> None:
    of = params_of(name, values)
    built = model_args(of.model, of.data)
    sizes = {"img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads"}
    assert {key: value for key, value in built.items() if key not in sizes} == changes


def test_view_of_all_patches_is_the_whole_image(encoder: VisionTransformer, chosen: Params) -> None:
    images, everything = images_for(chosen), torch.arange(4).expand(3, -1)
    whole = features_of_view(encoder, View(images))
    assert torch.allclose(features_of_view(encoder, View(images, everything)), whole, atol=1e-5)
    some = features_of_view(encoder, View(images, everything[:, :2]))
    other = images.clone()
    patch = chosen.model.patch_size
    other[:, :, patch:] = 7  # the lower two patches
    assert torch.allclose(features_of_view(encoder, View(other, everything[:, :2])), some, atol=1e-5)


@pytest.mark.parametrize("what", ["mim", "contrastive"])
def test_every_weight_that_trains_gets_a_gradient(chosen: Params, what: str) -> None:
    encoder, images = build_encoder(chosen.model, chosen.data), images_for(chosen, 4)
    if what == "mim":
        init_encoder_as_mae(encoder)
        mae = build_mae(encoder, chosen.mim)
        freeze_pooling(encoder)
        mae(images, torch.rand(4, 4)).backward()
        model: Any = mae
    else:
        init_encoder_as_moco(encoder)
        model = build_contrastive(encoder, chosen.contrastive)
        model(View(images), View(images.flip(3)), 0.0).backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # queries see a bias of all keys alike
    assert {name for name in without if not name.endswith("qkv.bias")} == set()
    assert encoder.pos_embed.requires_grad


def test_roles_cover_every_weight_at_its_depth(encoder: VisionTransformer) -> None:
    roles, depth = encoder_roles(encoder), len(encoder.blocks)
    assert roles.keys() == dict(encoder.named_parameters()).keys()
    for name, role in roles.items():
        head, _, rest = name.partition(".")
        expected = int(rest.split(".")[0]) + 1 if head == "blocks" else depth + 1 if head in ("norm", "fc_norm") else 0
        assert role.layer == expected, name


def test_folder_is_read_by_plain_timm_and_by_us(encoder: VisionTransformer, chosen: Params, tmp_path: Path) -> None:
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    save_encoder(tmp_path / "e", encoder, chosen.model, chosen.data, half, {})
    images = images_for(chosen)
    with torch.inference_mode():
        expected = encoder(images)
        theirs = timm.create_model(f"local-dir:{tmp_path / 'e'}", pretrained=True, num_classes=0).eval()
        assert torch.allclose(theirs(images), expected, atol=1e-5)
        assert torch.equal(load_encoder(tmp_path / "e")(images), expected)
    assert load_encoder(tmp_path / "e").pos_embed.requires_grad
    check_encoder_fits(tmp_path / "e", chosen.model, chosen.data)


def test_encoder_of_another_name_does_not_fit(values: dict[str, Any], tmp_path: Path) -> None:
    quick, plain = (f"vit_base_patch16_clip{name}_224" for name in ("_quickgelu", ""))
    one, other = params_of(quick, values), params_of(plain, values)
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    save_encoder(tmp_path / "e", build_encoder(one.model, one.data), one.model, one.data, half, {})
    with pytest.raises(LgpError, match=f"{quick}.*but the parameters say .*{plain}"):
        check_encoder_fits(tmp_path / "e", other.model, other.data)


@pytest.mark.parametrize("pool", ["class_token", "average"])
def test_classifier_is_read_by_plain_timm(
    encoder: VisionTransformer, chosen: Params, pool: Any, tmp_path: Path
) -> None:
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    save_encoder(tmp_path / "e", encoder, chosen.model, chosen.data, half, {})
    rng = np.random.default_rng(0)
    head = Head(rng.normal(size=(5, encoder.embed_dim)), rng.normal(size=5), pool)
    save_classifier(tmp_path / "c", tmp_path / "e", Classifier(1.0, head=head), ["a", "b", "c", "d", "e"], {})
    images = images_for(chosen)
    with torch.inference_mode():
        features = pooled_by_block(encoder, images, pool, 1)[:, 0].double().numpy()
        ours = load_classifier(tmp_path / "c", torch.device("cpu")).logits(images)
    expected = torch.from_numpy(head.logits(features)).float()
    assert torch.allclose(by_timm(tmp_path / "c", images), expected, atol=1e-3)
    assert torch.allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize("pool", ["class_token", "average"])
def test_fine_tuning_begins_with_the_encoders_weights(
    encoder: VisionTransformer, chosen: Params, pool: str, tmp_path: Path
) -> None:
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    save_encoder(tmp_path / "e", encoder, chosen.model, chosen.data, half, {})
    recipe = chosen.finetune["10pct"].model_copy(update={"pool": pool, "from_first_fc": False})
    model = build_classifier(tmp_path / "e", 5, recipe).eval()
    images = images_for(chosen)
    tokens = model.forward_features(images)
    if encoder.global_pool != "token" or pool == "class_token":
        assert torch.allclose(model.forward_head(tokens, pre_logits=True), encoder(images), atol=1e-5)
    else:  # MAE averages the patches before a new norm
        mean = encoder.blocks(encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images))))[:, -4:].mean(dim=1)
        assert torch.allclose(model.forward_head(tokens, pre_logits=True), model.fc_norm(mean), atol=1e-5)


def test_names_positions_learn_and_the_papers_do_not(values: dict[str, Any], params: Params, tmp_path: Path) -> None:
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    named = params_of("vit_base_patch16_224", values)  # the architecture that the four numbers are of
    for of, learn in ((named, True), (params, False)):
        save_encoder(tmp_path / str(learn), build_encoder(of.model, of.data), of.model, of.data, half, {})
        assert build_encoder(of.model, of.data).pos_embed.requires_grad is learn
        assert load_encoder(tmp_path / str(learn)).pos_embed.requires_grad is learn
    numbers = Params.model_validate(merged(named.model_dump(), {"model": {"timm": None}, "finetune": {}}))
    with pytest.raises(LgpError, match=r"'positions_learn': True.*'positions_learn': False"):
        check_encoder_fits(tmp_path / "True", numbers.model, numbers.data)
