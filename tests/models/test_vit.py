"""The encoder: positions and initialisation as the papers give them."""

import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lgp.models.vit import (
    build_encoder,
    embed,
    encode_tokens,
    init_encoder_as_mae,
    init_encoder_as_moco,
    sincos_positions,
)
from lgp.params.file import Params


@pytest.fixture
def encoder(params: Params) -> VisionTransformer:
    return build_encoder(params.model, params.data)


def test_positions_equal_a_slow_reference() -> None:
    width, grid = 16, 3
    positions = sincos_positions(width, grid)
    assert positions.shape == (1, 10, 16)
    assert (positions[0, 0] == 0).all()
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (column, row):
                angles = [place / 10000 ** (k / (width // 4)) for k in range(width // 4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert positions[0, 1 + row * grid + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_are_fixed(encoder: VisionTransformer) -> None:
    assert not encoder.pos_embed.requires_grad
    assert torch.equal(encoder.pos_embed, sincos_positions(16, 4))


def test_embedding_and_encoding_make_timms_forward(encoder: VisionTransformer) -> None:
    images = torch.randn(3, 1, 8, 8)
    encoder.eval()
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
    assert encoder.cls_token.abs().max() < 1e-5


def test_shape_matches_the_papers_vit_b16() -> None:
    encoder = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert sum(p.numel() for p in encoder.parameters()) == 85_798_656
    assert sincos_positions(768, 14).shape == encoder.pos_embed.shape
