"""The pictures that masked image modelling leaves for the report."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from lgp.compute.randomness import generator
from lgp.data.labels import LabelledImages
from lgp.models.mae import patchify, random_masking
from lgp.models.vit import build_encoder, init_encoder_as_mae
from lgp.params.file import Params
from lgp.pretrain.arm import Pretrained
from lgp.pretrain.mim import build_mae, write_reconstructions
from lgp.pretrain.sanity_checks import Findings
from lgp.training.loop import Progression


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
