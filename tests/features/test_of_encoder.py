"""What of an arm's folder decides its features: of an encoder, of raw pixels, of random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FOREIGN

from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.features.cache import FeatureCache, pixel_source
from lgp.features.extraction import ALONE, by_block_of, extract, features_of, pixels
from lgp.features.of_encoder import encoder_features, encoder_source, live_features_of
from lgp.models.encoder_folder import load_encoder, save_encoder, save_pixels
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params
from lgp.pretrain.baselines import baseline_encoder

CPU = torch.device("cpu")


def random_arm(folder: Path, params: Params, prepared: LabelledImages) -> Path:
    encoder = baseline_encoder("random", params)
    assert encoder is not None
    save_encoder(folder, encoder, params.model, params.data, prepared.normalization, {})
    return folder


def test_pixels_are_an_arm(
    prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert baseline_encoder("pixels", params) is None
    folder = tmp_path / "pixels" / "encoder"
    save_pixels(folder, prepared, {})
    found, expected = encoder_source(folder, FeatureParams(), ALONE), pixel_source()
    assert (found.digest, found.blocks) == (expected.digest, expected.blocks)
    images = prepared.normalize(prepared.whole(prepared.ids("val")))
    flat = images.flatten(1)
    assert torch.equal(found.encode()(images)[:, 0], flat)
    assert torch.equal(live_features_of(folder, FeatureParams(), CPU)(images), flat)
    features = encoder_features(folder, prepared, params, CPU)
    assert np.array_equal(features.x["val"], flat.numpy())
    assert list((tmp_path / ".lgp" / "features").glob("*.lock"))
    with pytest.raises(LgpError, match="stands for raw pixels, which have no encoder: choose another arm"):
        load_encoder(folder)


def test_random_weights_are_an_arm_that_the_seed_decides(
    prepared: LabelledImages, params: Params, tmp_path: Path
) -> None:
    other_seed = Params.model_validate(params.model_dump() | {"seed": 9})
    seeds = {"a": params, "b": params, "c": other_seed}
    folders = [random_arm(tmp_path / name / "encoder", of_arm, prepared) for name, of_arm in seeds.items()]
    digests = [encoder_source(folder, FeatureParams(), ALONE).digest for folder in folders]
    assert digests[0] == digests[1] != digests[2]
    source = encoder_source(folders[0], FeatureParams(), ALONE)
    encoder = baseline_encoder("random", params)
    assert encoder is not None
    images = prepared.normalize(prepared.whole(prepared.ids("val")))
    with torch.inference_mode():
        expected = by_block_of(encoder, "class_token", source.blocks, CPU)(images)
        assert torch.equal(source.encode()(images), expected)


def test_pooling_and_depth_are_part_of_the_digest(encoder_folder: Path, params: Params) -> None:
    changes = ({}, {"pool": "average"}, {"by_depth": False}, {"by_depth": False, "blocks": 2})
    sources = [encoder_source(encoder_folder, FeatureParams.model_validate(c), ALONE) for c in changes]
    assert len({source.digest for source in sources}) == 4
    assert [source.blocks for source in sources] == [params.model.depth, params.model.depth, 1, 2]


def test_encoder_of_images_of_another_size_is_refused(
    prepared: LabelledImages, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    folder = tmp_path / "pixels" / "encoder"
    save_pixels(folder, prepared, {})
    monkeypatch.setitem(prepared.meta, "image_size", 16)
    with pytest.raises(LgpError, match=r"takes images of \[1, 8, 8\] .* the prepared ones are \[1, 16, 16\]"):
        encoder_features(folder, prepared, params, CPU)


def test_features_are_of_images_with_the_encoders_statistics(
    prepared: LabelledImages,
    params: Params,
    encoder_folder: Path,
    foreign_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    ids, encode = prepared.ids("val"), features_of(load_encoder(encoder_folder), CPU)
    for folder, data in ((encoder_folder, prepared), (foreign_folder, prepared.normalized_by(FOREIGN))):
        found = encoder_features(folder, prepared, params, CPU).x["val"]
        assert np.abs(found - extract(encode, data, ids)).max() < 1e-5


def test_same_weights_with_other_statistics_are_other_features(
    prepared: LabelledImages, params: Params, encoder_folder: Path, tmp_path: Path
) -> None:
    source, ours = encoder_source(encoder_folder, params.features, ALONE), prepared.normalization
    cache = FeatureCache(tmp_path, params.features, 1.0)
    kept = cache.features(source, prepared).x["val"]
    for other in (replace(ours, mean=FOREIGN.mean), replace(ours, std=FOREIGN.std)):
        anew = cache.features(source, prepared.normalized_by(other)).x["val"]
        assert np.abs(kept - anew).max() > 0.01


def test_pixels_are_flattened_channel_by_channel() -> None:
    images = torch.arange(24.0).view(1, 2, 3, 4)
    assert pixels(images).tolist() == [list(range(24))]
