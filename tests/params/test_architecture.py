"""A name of timm in place of the dimensions of the encoder."""

from typing import Any

import pytest
import timm
from pydantic import ValidationError

from lgp.params.architecture import architecture
from lgp.params.file import Params
from lgp.params.model import ModelParams

DINOV2 = {"patch_size": 14, "width": 384, "depth": 12, "heads": 6}


def test_name_has_the_numbers() -> None:
    assert ModelParams.model_validate({"timm": "vit_small_patch14_dinov2"}).model_dump() == DINOV2 | {
        "timm": "vit_small_patch14_dinov2"
    }


def test_what_was_written_out_is_read_again() -> None:
    model = ModelParams.model_validate({"timm": "vit_small_patch14_dinov2"})
    assert ModelParams.model_validate(model.model_dump()) == model


@pytest.mark.parametrize("number", DINOV2)
def test_numbers_that_are_not_the_names_are_refused(number: str) -> None:
    with pytest.raises(ValidationError, match=f"{number} 2 is not that of vit_small_patch14_dinov2, {DINOV2[number]}"):
        ModelParams.model_validate({"timm": "vit_small_patch14_dinov2", number: 2})


def test_without_a_name_every_number_is_needed() -> None:
    with pytest.raises(ValidationError, match="width\n  Field required"):
        ModelParams.model_validate({"patch_size": 2, "depth": 1, "heads": 2})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_tiny", "as timm builds it as ConvNeXt"),
        ("vit_small_patch16_dinov3", "as timm builds it as Eva"),
        ("deit_tiny_distilled_patch16_224", "as timm builds it as VisionTransformerDistilled"),
        ("vit_small_patch16_18x2_224", r"its blocks are of another kind \(ParallelThingsBlock\)"),
        ("vit_small_r26_s32_224", "its patches come from a convolutional network"),
        ("vit_small_patch14_dinov2.lvd142m", "give the architecture alone, 'vit_small_patch14_dinov2'"),
        ("vit_smal_patch14_dinov2", "timm has no model .* e.g. vit_small_patch14_dinov2"),
        ("../x", "timm has no model '../x'"),
    ],
)
def test_what_is_no_plain_vit_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        architecture(name)


def test_every_plain_vit_of_timm_that_is_small_has_its_own_numbers() -> None:
    for name in ("test_vit", "test_vit2", "test_vit3", "test_vit4", "vit_tiny_patch16_224"):
        model = timm.create_model(name)
        first = model.blocks[0].attn
        found = architecture(name)
        assert (found.patch_size, found.width) == (model.patch_embed.patch_size[0], model.embed_dim)
        assert (found.depth, found.heads) == (len(model.blocks), first.num_heads)


def test_fault_of_a_name_is_one_of_the_parameters(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="'convnext_tiny' is no plain ViT"):
        Params.model_validate({**values, "model": {"timm": "convnext_tiny"}})
