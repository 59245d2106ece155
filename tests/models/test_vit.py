"""The encoder: positions and initialisation as the papers give them."""

import math
from collections.abc import Callable

import pytest
import timm
import torch
from conftest import ROOT
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lgp.models.vit import (
    build_encoder,
    embed,
    encode_tokens,
    init_encoder_as_mae,
    init_encoder_as_moco,
    sincos_positions,
    tokens_by_block,
)
from lgp.params.file import Params, load_params


@pytest.fixture
def encoder(params: Params) -> VisionTransformer:
    return build_encoder(params.model, params.data)


def test_positions_equal_a_slow_reference() -> None:
    width, grid = 16, 14
    positions = sincos_positions(width, grid)
    assert positions.shape == (1, 197, 16)
    assert (positions[0, 0] == 0).all()
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (k / (width // 4)) for k in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert positions[0, 1 + row * grid + column].tolist() == pytest.approx(expected, abs=1e-7)


def test_positions_are_fixed(encoder: VisionTransformer) -> None:
    assert not encoder.pos_embed.requires_grad
    assert torch.equal(encoder.pos_embed, sincos_positions(16, 4))


def test_embedding_and_encoding_make_timms_forward(encoder: VisionTransformer) -> None:
    images = torch.randn(3, 1, 8, 8)
    encoder.eval()
    nn.init.normal_(encoder.pos_embed)  # learned positions have one for the class token too
    tokens = encode_tokens(encoder, embed(encoder, images))
    assert torch.allclose(tokens[:, 0], encoder(images), atol=1e-6)
    assert torch.allclose(tokens, encoder.forward_features(images), atol=1e-6)


def test_mae_initialisation(encoder: VisionTransformer) -> None:
    init_encoder_as_mae(encoder)
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert (layer.bias == 0).all()
    bound = math.sqrt(6 / (16 + 4))  # a patch of 2 × 2 grey pixels as a linear layer
    assert 0.8 * bound < encoder.patch_embed.proj.weight.abs().max() <= bound


def test_moco_initialisation(encoder: VisionTransformer) -> None:
    init_encoder_as_moco(encoder)
    qkv = encoder.blocks[0].attn.qkv.weight
    assert 0.9 * math.sqrt(6 / 32) < qkv.abs().max() <= math.sqrt(6 / 32)  # three layers of 16 → 16, not one of 16 → 48
    projection = encoder.patch_embed.proj
    assert 0.8 * math.sqrt(6 / 20) < projection.weight.abs().max() <= math.sqrt(6 / 20)
    assert (projection.bias == 0).all()
    for weight, bound in ((qkv, math.sqrt(6 / 32)), (projection.weight, math.sqrt(6 / 20))):
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)  # uniform
        assert abs(weight.mean().item()) < bound / 4
    assert encoder.cls_token.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("preset", "parameters", "plain"),
    [
        ("imagenet-vit-b16", 85_798_656, "vit_base_patch16_224"),
        ("imagenet-vit-l16", 303_301_632, "vit_large_patch16_224"),
    ],
)
def test_our_encoder_has_the_papers_shapes(preset: str, parameters: int, plain: str) -> None:
    params = load_params(ROOT / "presets" / f"{preset}.yaml")
    with torch.device("meta"):  # shapes without memory
        ours, timms = build_encoder(params.model, params.data), timm.create_model(plain, num_classes=0)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in timms.state_dict().items()}
    assert ours.blocks[0].attn.num_heads == timms.blocks[0].attn.num_heads
    assert sincos_positions(params.model.width, 14).shape == ours.pos_embed.shape


@pytest.mark.parametrize(("init", "token_std"), [(init_encoder_as_mae, 0.02), (init_encoder_as_moco, 1e-6)])
def test_initialisation_leaves_nothing_of_earlier_weights(
    encoder: VisionTransformer, init: Callable[[VisionTransformer], None], token_std: float
) -> None:
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(7.0)
    init(encoder)
    assert not any((p == 7).any() for p in encoder.parameters() if p is not encoder.pos_embed)
    for name, parameter in encoder.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
    assert 0.5 * token_std < encoder.cls_token.std() < 1.5 * token_std


def test_tokens_of_each_block_are_those_of_an_encoder_that_ends_there(encoder: VisionTransformer) -> None:
    images = torch.randn(3, 1, 8, 8)
    after = tokens_by_block(encoder.eval(), images)
    for depth in (3, 2, 1):
        encoder.blocks = encoder.blocks[:depth]
        assert torch.allclose(after[depth - 1], encoder.forward_features(images), atol=1e-6)
    assert len(after) == 3
