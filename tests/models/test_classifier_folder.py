"""Classifier folders: what is kept gives the same logits in lgp and in plain timm."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.features.cache import normalizer
from lgp.features.extraction import by_block_of
from lgp.models.classifier_folder import (
    HEAD,
    Classifier,
    Head,
    load_classifier,
    read_classifier,
    save_classifier,
    write_classifier,
)
from lgp.models.encoder_folder import load_encoder, save_pixels
from lgp.models.files import CONFIG, WEIGHTS

CLASSES = ["ant", "bee", "wasp"]
CPU = torch.device("cpu")


def head(width: int, **changes: object) -> Head:
    rng = np.random.default_rng(0)
    return Head(rng.normal(size=(3, width)), rng.normal(size=3), **changes)  # type: ignore[arg-type]


def images(encoder: Path) -> Tensor:
    size = json.loads((encoder / CONFIG).read_text())["pretrained_cfg"]["input_size"]
    return torch.randn(5, *size, generator=torch.Generator().manual_seed(0))


def width_of(encoder: Path) -> int:
    return int(json.loads((encoder / CONFIG).read_text())["num_features"])


@torch.inference_mode()
@pytest.mark.parametrize("pool", ["class_token", "average"])
def test_plain_timm_gives_the_logits_of_a_plain_head(encoder_folder: Path, tmp_path: Path, pool: str) -> None:
    kept = head(width_of(encoder_folder), pool=pool)
    save_classifier(tmp_path / "c", encoder_folder, Classifier(2.5, kept), CLASSES, {})
    x = images(encoder_folder)
    features = by_block_of(load_encoder(encoder_folder), pool, 1, CPU)(x)[:, 0]
    model = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    assert np.allclose(model(x), kept.logits(features.double().numpy()), atol=1e-5)
    opened = load_classifier(tmp_path / "c", CPU)
    assert torch.equal(opened.logits(x), model(x))
    assert opened.classes == CLASSES == model.pretrained_cfg["label_names"]
    assert opened.config["temperature"] == 2.5
    assert not (tmp_path / "c" / HEAD).exists()


@torch.inference_mode()
@pytest.mark.parametrize(("blocks", "normalized"), [(2, False), (1, True), (2, True)])
def test_head_without_a_place_in_timm_has_a_file_of_its_own(
    encoder_folder: Path, tmp_path: Path, blocks: int, normalized: bool
) -> None:
    kept = head(blocks * width_of(encoder_folder), pool="average", blocks=blocks, normalized=normalized)
    save_classifier(tmp_path / "c", encoder_folder, Classifier(1.0, kept), CLASSES, {})
    x = images(encoder_folder)
    features = by_block_of(load_encoder(encoder_folder), "average", blocks, CPU)(x).flatten(1).numpy()
    expected = kept.logits(normalizer(features)(features) if normalized else features)
    assert np.allclose(load_classifier(tmp_path / "c", CPU).logits(x), expected, atol=1e-5)
    encoder = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    assert torch.equal(encoder(x), load_encoder(encoder_folder).eval()(x))


@torch.inference_mode()
def test_raw_pixels_have_a_classifier_too(prepared: LabelledImages, tmp_path: Path) -> None:
    save_pixels(tmp_path / "encoder", prepared, {})
    kept = head(prepared.channels * prepared.image_size**2)
    save_classifier(tmp_path / "c", tmp_path / "encoder", Classifier(1.0, kept), CLASSES, {"arm": "pixels"})
    x = prepared.normalize(prepared.whole(np.arange(4)))
    opened = load_classifier(tmp_path / "c", CPU)
    assert np.allclose(opened.logits(x), kept.logits(x.flatten(1).numpy()), atol=1e-5)
    assert json.loads((tmp_path / "c" / "provenance.json").read_text())["arm"] == "pixels"


@torch.inference_mode()
def test_fine_tuned_model_is_kept_whole(encoder_folder: Path, tmp_path: Path) -> None:
    config = json.loads((encoder_folder / CONFIG).read_text())
    torch.manual_seed(0)
    model = timm.create_model(config["architecture"], num_classes=3, global_pool="avg", **config["model_args"]).eval()
    kept = Classifier(1.0, model=model.state_dict(), model_args={"global_pool": "avg"}, interpolation="bicubic")
    save_classifier(tmp_path / "c", encoder_folder, kept, CLASSES, {})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    x = images(encoder_folder)
    assert torch.equal(loaded(x), model(x))
    assert loaded.pretrained_cfg["interpolation"] == "bicubic"


def test_logits_are_divided_by_a_temperature_and_taken_off_a_scale() -> None:
    rng = np.random.default_rng(1)
    x, mean, std = rng.normal(size=(7, 4)), rng.normal(size=4), rng.uniform(0.5, 2, 4)
    of_scaled = head(4)
    assert np.allclose(of_scaled.on_unscaled(mean, std).logits(x), of_scaled.logits((x - mean) / std))
    assert np.allclose(of_scaled.divided_by(2.0).logits(x), of_scaled.logits(x) / 2)


@pytest.mark.parametrize("whole", [True, False])
def test_kept_classifier_is_read_again_where_the_same_decided_it(tmp_path: Path, whole: bool) -> None:
    file = tmp_path / "kept.safetensors"
    model = {"head.weight": torch.ones(3, 2)} if whole else None
    kept = Classifier(1.5, None if whole else head(4, blocks=2), model, {"global_pool": "avg"}, "bicubic")
    write_classifier(file, kept, "digest")
    again = read_classifier(file, "digest")
    assert again is not None
    assert (again.temperature, again.model_args, again.interpolation) == (1.5, {"global_pool": "avg"}, "bicubic")
    if again.head is None or kept.head is None:
        assert again.model is not None
        assert torch.equal(again.model["head.weight"], torch.ones(3, 2))
    else:
        assert np.array_equal(again.head.weight, kept.head.weight)
        assert (again.head.blocks, again.head.pool) == (2, "class_token")
    assert read_classifier(file, "another") is None
    save_file({}, file)
    assert read_classifier(file, "digest") is None
    file.write_bytes(b"damaged")
    assert read_classifier(file, "digest") is None


def test_what_is_no_classifier_is_told(encoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(LgpError, match="there is no classifier in"):
        load_classifier(tmp_path, CPU)
    with pytest.raises(LgpError, match="has an encoder without classes"):
        load_classifier(encoder_folder, CPU)
    save_classifier(tmp_path / "c", encoder_folder, Classifier(1.0, head(width_of(encoder_folder))), CLASSES, {})
    save_file({"head.weight": torch.ones(2)}, tmp_path / "c" / WEIGHTS)
    with pytest.raises(LgpError, match=r"is damaged: .* run `lgp .* again"):
        load_classifier(tmp_path / "c", CPU)
