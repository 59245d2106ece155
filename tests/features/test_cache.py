"""Features once: what is found again, what is not, and what is thrown away."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from lgp.data.labels import LabelledImages
from lgp.features import cache as module
from lgp.features.cache import FeatureCache, FeatureSource, normalizer, pixel_source, standardizer
from lgp.features.extraction import class_token_of, extract
from lgp.features.of_encoder import encoder_source, live_features_of
from lgp.models.encoder_folder import load_encoder
from lgp.models.vit import tokens_by_block
from lgp.params.evaluate import FeatureParams

CPU = torch.device("cpu")


def cache(folder: Path, gib: float = 1.0, **changes: Any) -> FeatureCache:
    return FeatureCache(folder, FeatureParams.model_validate(changes), gib)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is extracted while a test runs."""
    sizes: list[int] = []
    extracted = module.extracted

    def counting(encode: Callable[..., Any], data: LabelledImages, ids: np.ndarray) -> Any:
        sizes.append(len(ids))
        return extracted(encode, data, ids)

    monkeypatch.setattr(module, "extracted", counting)
    return sizes


def test_features_are_extracted_once(
    tmp_path: Path, encoder_folder: Path, prepared: LabelledImages, counted: list[int]
) -> None:
    source = encoder_source(encoder_folder, FeatureParams(), CPU)
    first = cache(tmp_path).features(source, prepared)
    assert counted == [len(prepared.ids(split)) for split in ("train", "val", "test")]
    again = cache(tmp_path).features(source, prepared)
    assert len(counted) == 3
    assert all(np.array_equal(first.x[split], again.x[split]) for split in first.x)
    assert all(isinstance(x, np.memmap) for x in again.x.values())
    whole = extract(class_token_of(load_encoder(encoder_folder), CPU), prepared, prepared.ids("test"))
    assert np.abs(again.x["test"] - whole).max() < 1e-5
    assert np.array_equal(again.y["test"], prepared.labels[prepared.ids("test")])


def test_other_weights_pooling_data_or_type_are_other_features(
    tmp_path: Path, encoder_folder: Path, prepared: LabelledImages, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = encoder_source(encoder_folder, FeatureParams(), CPU)
    cache(tmp_path).features(source, prepared)
    average = FeatureParams(pool="average")
    cache(tmp_path).features(encoder_source(encoder_folder, average, CPU), prepared)
    cache(tmp_path).features(replace(source, digest="others"), prepared)
    half = cache(tmp_path, dtype="float16").features(source, prepared)
    assert half.x["train"].dtype == np.float16
    monkeypatch.setitem(prepared.meta, "digest", "another")
    cache(tmp_path).features(source, prepared)
    assert len(counted) == 5 * 3


def test_other_splits_are_other_features_and_other_labels_alone_are_not(
    tmp_path: Path, prepared: LabelledImages, counted: list[int]
) -> None:
    def relabelled(name: str, change: Callable[[pd.DataFrame], None]) -> LabelledImages:
        shutil.copytree(prepared.folder.parent / "labels", tmp_path / name)
        table = pd.read_parquet(tmp_path / name / "labels.parquet")
        change(table)
        table.to_parquet(tmp_path / name / "labels.parquet", index=False)
        return LabelledImages(prepared.folder, tmp_path / name)

    def moved(table: pd.DataFrame) -> None:
        table.loc[prepared.ids("val")[0], "split"] = "train"

    def renamed(table: pd.DataFrame) -> None:
        table["label"] = (table["label"] + 1) % 10

    first = cache(tmp_path / "cache").features(pixel_source(), prepared)
    other = cache(tmp_path / "cache").features(pixel_source(), relabelled("moved", moved))
    assert counted[3:] == [counted[0] + 1, counted[1] - 1, counted[2]]
    assert prepared.ids("val")[0] in other.ids["train"]
    assert len(other.x["train"]) == len(first.x["train"]) + 1
    again = cache(tmp_path / "cache").features(pixel_source(), relabelled("renamed", renamed))
    assert len(counted) == 6
    assert np.array_equal(again.x["train"], first.x["train"])
    assert np.array_equal(again.y["train"], (first.y["train"] + 1) % 10)


@pytest.mark.parametrize("pool", ["class_token", "average"])
def test_every_block_is_kept_and_the_last_ones_joined(
    tmp_path: Path, encoder_folder: Path, prepared: LabelledImages, pool: str
) -> None:
    params = FeatureParams.model_validate({"pool": pool, "blocks": 2})
    features = FeatureCache(tmp_path, params, 1.0).features(encoder_source(encoder_folder, params, CPU), prepared)
    ids = prepared.ids("val")
    with torch.inference_mode():
        after = tokens_by_block(load_encoder(encoder_folder).eval(), prepared.normalize(prepared.whole(ids)))
    for found, tokens in zip(features.by_block["val"], after, strict=True):
        expected = tokens[:, 0] if pool == "class_token" else tokens[:, 1:].mean(dim=1)
        assert np.allclose(found, expected.numpy(), atol=1e-6)
    assert np.array_equal(features.x["val"], np.concatenate(features.by_block["val"][-2:], axis=1))
    with torch.inference_mode():
        live = live_features_of(encoder_folder, params, CPU)(prepared.normalize(prepared.whole(ids)))
    assert np.allclose(features.x["val"], live.numpy(), atol=1e-6)


def test_without_depth_only_the_last_blocks_are_stored(
    tmp_path: Path, encoder_folder: Path, prepared: LabelledImages
) -> None:
    params = FeatureParams(by_depth=False)
    features = FeatureCache(tmp_path, params, 1.0).features(encoder_source(encoder_folder, params, CPU), prepared)
    assert len(features.by_block["train"]) == 1


def test_extraction_that_was_killed_starts_anew(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> Any:
        yield np.zeros((100, 1, 64), dtype=np.float32)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "extracted", killed)
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path).features(pixel_source(), prepared)
    monkeypatch.undo()
    x = cache(tmp_path).features(pixel_source(), prepared).x["train"]
    assert np.abs(x).sum(axis=1).min() > 0
    assert not list(tmp_path.glob("*.partial"))


def test_features_larger_than_the_budget_are_given_all_the_same(
    tmp_path: Path, encoder_folder: Path, prepared: LabelledImages
) -> None:
    params = FeatureParams(blocks=3)
    features = FeatureCache(tmp_path, params, 0).features(encoder_source(encoder_folder, params, CPU), prepared)
    assert features.x["train"].shape == (220, 48)


def test_entry_in_use_by_another_process_stays(tmp_path: Path, prepared: LabelledImages) -> None:
    cache(tmp_path).features(pixel_source(), prepared)
    (entry,) = (p for p in tmp_path.iterdir() if p.is_dir())
    other = FeatureSource("b", 1, pixel_source().encode)
    with FileLock(entry.with_suffix(".lock"), thread_local=False):
        cache(tmp_path, gib=0).features(other, prepared)
    assert entry.exists()
    cache(tmp_path, gib=0).features(replace(other, digest="c"), prepared)
    assert not entry.exists()


def test_what_killed_processes_left_is_removed(tmp_path: Path, prepared: LabelledImages) -> None:
    orphan = tmp_path / f"{'0' * 32}.partial"
    orphan.mkdir()
    (orphan / "train-0.npy").write_bytes(b"half")
    cache(tmp_path).features(pixel_source(), prepared)
    assert not orphan.exists()


def test_what_was_not_read_for_longest_goes_first(tmp_path: Path, prepared: LabelledImages, counted: list[int]) -> None:
    one = sum(len(prepared.ids(split)) for split in ("train", "val", "test")) * 64 * 4 / 2**30

    def features(name: str) -> None:
        time.sleep(0.02)  # file systems tell times apart by some milliseconds
        cache(tmp_path, gib=2.2 * one).features(FeatureSource(name, 1, pixel_source().encode), prepared)

    for name in ("a", "b", "a", "c"):
        features(name)
    assert len(counted) == 9
    features("a")
    assert len(counted) == 9
    features("b")
    assert len(counted) == 12


def test_standardised_features_have_mean_0_and_deviation_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 7)
    x = np.random.default_rng(0).normal(3, 5, (50, 4)).astype(np.float32)
    scaled = standardizer(x)(x)
    assert np.allclose(scaled.mean(axis=0), 0, atol=1e-6)
    assert np.allclose(scaled.std(axis=0), 1, atol=1e-6)
    assert standardizer(np.ones((5, 2)))(np.ones((3, 2))).tolist() == [[0, 0]] * 3


def test_normalised_features_have_mean_0_and_length_1_each() -> None:
    x = np.random.default_rng(0).normal(3, 5, (50, 4))
    scaled = normalizer(x)(x)
    assert np.allclose(scaled.mean(axis=1), 0, atol=1e-6)
    assert np.allclose(np.linalg.norm(scaled, axis=1), 1, atol=1e-6)
