"""The pictures that masked image modelling leaves for the report."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Silent, merged
from safetensors.torch import load_file

from lgp.compute.randomness import generator
from lgp.data.labels import LabelledImages
from lgp.models.mae import patchify, random_masking
from lgp.models.vit import build_encoder, init_encoder_as_mae
from lgp.params.file import Params
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.mim import build_mae, pretrain_mim, write_reconstructions
from lgp.pretrain.sanity_checks import Findings
from lgp.training.loop import Progression
from lgp.training.resume_states import StateStore


def test_pictures_show_validation_images_masked_and_painted_in_their_own_colours(
    tmp_path: Path, prepared: LabelledImages, params: Params
) -> None:
    encoder = build_encoder(params.model, params.data)
    init_encoder_as_mae(encoder)
    mae = build_mae(encoder, params.mim)
    result = Pretrained(mae, Progression(), Findings(), {})
    tensors = write_reconstructions(tmp_path / "pictures.safetensors", result, prepared, seed=3)
    images = prepared.whole(prepared.ids("val")[:10])
    assert torch.equal(tensors["original"], images.float() / 255)
    noise = torch.rand(10, 16, generator=generator(3, "mim/picture"))
    hidden = random_masking(noise, params.mim.mask_ratio)[2].bool()
    original, masked, painted = (patchify(tensors[name], 2) for name in ("original", "masked", "painted"))
    assert torch.allclose(masked[~hidden], original[~hidden], atol=1e-5)
    assert torch.allclose(painted[~hidden], original[~hidden], atol=1e-5)
    assert torch.allclose(masked[hidden], torch.tensor(prepared.mean), atol=1e-5)
    expected = prepared.denormalize(mae.reconstruct(prepared.normalize(images), noise)[0])
    assert torch.allclose(tensors["painted"], expected)
    written = load_file(tmp_path / "pictures.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_alarm_knows_of_how_many_images_the_accuracy_is(
    values: dict[str, Any], prepared: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("lgp.pretrain.arm.fallen", lambda _, images: seen.append(images) or [])
    params = Params.model_validate(merged(values, {"run": {"online_knn": {"every_epochs": 1, "val_images": 7}}}))
    pretrain_mim(Session(prepared, params, StateStore(tmp_path, "code"), Silent(), prepared))
    assert seen == [7] * params.mim.epochs
