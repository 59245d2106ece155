"""Features once: what is found again, what is not, and what is thrown away."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, merged, prepare_all
from filelock import FileLock

from lgp.compute.seals import seal
from lgp.data.labels import LabelledImages
from lgp.features import cache as module
from lgp.features.cache import FeatureCache, Features, FeatureSource, normalizer, pixel_source, standardizer
from lgp.features.extraction import ALONE, extract, features_of, pixels
from lgp.features.of_encoder import encoder_source, live_features_of
from lgp.models.encoder_folder import load_encoder
from lgp.models.vit import tokens_by_block
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params

CPU = torch.device("cpu")


def cache(folder: Path, gib: float = 1.0, **changes: Any) -> FeatureCache:
    return FeatureCache(folder, FeatureParams.model_validate(changes), gib)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is extracted while a test runs."""
    sizes: list[int] = []
    extracted = module.extracted

    def counting(encode: Callable[..., Any], data: LabelledImages, ids: np.ndarray, **how: Any) -> Any:
        sizes.append(len(ids))
        return extracted(encode, data, ids, **how)

    monkeypatch.setattr(module, "extracted", counting)
    return sizes


def test_features_are_extracted_once(
    tmp_path: Path, encoder_folder: Path, prepared: LabelledImages, counted: list[int]
) -> None:
    source = encoder_source(encoder_folder, FeatureParams(), ALONE)
    first = cache(tmp_path).features(source, prepared)
    assert counted == [len(prepared.ids(split)) for split in ("train", "val", "test")]
    again = cache(tmp_path).features(source, prepared)
    assert len(counted) == 3
    assert all(np.array_equal(first.x[split], again.x[split]) for split in first.x)
    assert all(isinstance(again.x[split], np.memmap) for split in ("train", "val", "test"))
    assert np.shares_memory(again.x["train"], again.by_block["train"][-1])
    whole = extract(features_of(load_encoder(encoder_folder), CPU), prepared, prepared.ids("test"))
    assert np.abs(again.x["test"] - whole).max() < 1e-5
    assert np.array_equal(again.y["test"], prepared.labels[prepared.ids("test")])


def test_other_weights_pooling_data_or_type_are_other_features(
    tmp_path: Path, encoder_folder: Path, prepared: LabelledImages, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = encoder_source(encoder_folder, FeatureParams(), ALONE)
    cache(tmp_path).features(source, prepared)
    average = FeatureParams(pool="average")
    cache(tmp_path).features(encoder_source(encoder_folder, average, ALONE), prepared)
    cache(tmp_path).features(replace(source, digest="others"), prepared)
    half = cache(tmp_path, dtype="float16").features(source, prepared)
    assert half.x["train"].dtype == np.float16
    monkeypatch.setitem(prepared.meta, "digest", "another")
    cache(tmp_path).features(source, prepared)
    assert len(counted) == 5 * 3


@dataclass
class Relabelled:
    """The prepared images with other labels, and their cache."""

    prepared: LabelledImages
    folder: Path
    encoded: list[int] = field(default_factory=list)  # numbers of images

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Turn images into pixels and their negative, as two blocks."""
        self.encoded.append(len(images))
        return torch.stack([pixels(images), -pixels(images)], dim=1)

    def with_(self, name: str, change: Callable[[pd.DataFrame], None]) -> LabelledImages:
        """Return the images with a changed table of labels and splits."""
        shutil.copytree(self.prepared.folder.parent / "labels", self.folder / name)
        table = pd.read_parquet(self.folder / name / "labels.parquet")
        change(table)
        table.to_parquet(self.folder / name / "labels.parquet", index=False)
        seal(self.folder / name, ["labels.parquet"])
        return LabelledImages(self.prepared.folder, self.folder / name)

    def features(self, data: LabelledImages, **changes: Any) -> Features:
        """Return the features of `encode`."""
        return cache(self.folder / "cache", **changes).features(FeatureSource("two", 2, lambda: self.encode), data)


@pytest.fixture
def relabelled(prepared: LabelledImages, tmp_path: Path) -> Relabelled:
    return Relabelled(prepared, tmp_path)


def of_images(data: LabelledImages, ids: np.ndarray) -> np.ndarray:
    """The second block of `Relabelled.features`, computed anew."""
    return -data.normalize(data.whole(ids)).flatten(1).numpy()


def unlabel(ids: np.ndarray) -> Callable[[pd.DataFrame], None]:
    def change(table: pd.DataFrame) -> None:
        table.loc[ids, ["label", "split"]] = [-1, "unlabeled"]

    return change


def test_labels_that_arrive_later_extract_nothing(relabelled: Relabelled) -> None:
    prepared, train = relabelled.prepared, relabelled.prepared.ids("train")
    few = relabelled.with_("few", unlabel(train[::3]))
    before = relabelled.features(few)
    encoded = [len(prepared.ids(split)) for split in ("train", "val", "test")]
    assert relabelled.encoded == encoded  # the unlabelled images are there already
    assert before.ids["unlabeled"].tolist() == train[::3].tolist()
    assert before.y["unlabeled"].tolist() == [-1] * len(train[::3])
    for split in ("train", "unlabeled", "val", "test"):
        assert np.array_equal(before.x[split], of_images(few, few.ids(split)))
        assert np.array_equal(before.by_block[split][0], -before.x[split])
        assert before.y[split].tolist() == few.labels[few.ids(split)].tolist()
    after = relabelled.features(prepared)
    assert relabelled.encoded == encoded
    assert np.array_equal(after.x["train"], of_images(prepared, train))
    assert len(after.x["unlabeled"]) == 0


def test_splits_are_read_from_the_cache_where_they_follow_each_other_and_else_copied(relabelled: Relabelled) -> None:
    few = relabelled.with_("few", unlabel(relabelled.prepared.ids("train")[::2]))
    features = relabelled.features(few)
    for split, shared in {"val": True, "test": True, "train": False, "unlabeled": False}.items():
        assert isinstance(features.x[split], np.memmap)
        assert np.shares_memory(features.x[split], features.by_block[split][1]) == shared
        assert features.x[split] is features.x[split]
    features.x["train"][:] = 0
    assert np.array_equal(relabelled.features(few).x["train"], of_images(few, few.ids("train")))


def test_a_split_is_copied_only_when_it_is_asked_for(relabelled: Relabelled, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    monkeypatch.setattr(module, "check_disk_space", lambda _folder, needed: copies.append(needed))
    monkeypatch.setattr(module, "ROWS", 7)
    some = relabelled.prepared.ids("train")[::2]
    data = relabelled.with_("few", unlabel(some))
    features = relabelled.features(data)
    copies.clear()  # of the extraction
    assert features.x["test"].shape[1] == 64
    assert copies == []
    assert np.array_equal(features.x["unlabeled"], of_images(data, some))
    assert copies == [len(some) * 64 * 4]
    with pytest.raises(KeyError):
        features.x["unlabelled"]


def test_images_that_labels_moved_to_another_split_are_found_there(relabelled: Relabelled, counted: list[int]) -> None:
    prepared = relabelled.prepared
    listed = prepared.ids("val")[[0, 3]]

    def moved(table: pd.DataFrame) -> None:
        table.loc[listed, "split"] = "train"

    def renamed(table: pd.DataFrame) -> None:
        table["label"] = (table["label"] + 1) % 10

    first = relabelled.features(prepared)
    data = relabelled.with_("moved", moved)
    other = relabelled.features(data, blocks=2)
    assert np.isin(listed, other.ids["train"]).all()
    for split in ("train", "val"):
        assert np.array_equal(other.x[split][:, 64:], of_images(data, data.ids(split)))
        assert np.array_equal(other.x[split][:, :64], -other.x[split][:, 64:])
    again = relabelled.features(relabelled.with_("renamed", renamed))
    assert len(relabelled.encoded) == 3
    assert np.array_equal(again.x["train"], first.x["train"])
    assert np.array_equal(again.y["train"], (first.y["train"] + 1) % 10)


def test_images_of_other_parts_are_other_features(relabelled: Relabelled, tmp_path: Path) -> None:
    relabelled.features(relabelled.prepared)
    values = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text())
    params = Params.model_validate(merged(merged(values, SMALL), {"data": {"val_share": 0.3}}))
    other = prepare_all(params, tmp_path / "other")
    found = relabelled.features(other)
    assert len(relabelled.encoded) == 6
    assert np.array_equal(found.x["val"], of_images(other, other.ids("val")))


@pytest.mark.parametrize("pool", ["class_token", "average"])
def test_every_block_is_kept_and_the_last_ones_joined(
    tmp_path: Path, encoder_folder: Path, prepared: LabelledImages, pool: str
) -> None:
    params = FeatureParams.model_validate({"pool": pool, "blocks": 2})
    features = FeatureCache(tmp_path, params, 1.0).features(encoder_source(encoder_folder, params, ALONE), prepared)
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
    features = FeatureCache(tmp_path, params, 1.0).features(encoder_source(encoder_folder, params, ALONE), prepared)
    assert len(features.by_block["train"]) == 1


def test_extraction_that_was_killed_starts_anew(
    tmp_path: Path, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, running: Any) -> Any:
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
    features = FeatureCache(tmp_path, params, 0).features(encoder_source(encoder_folder, params, ALONE), prepared)
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
    parts = standardizer(x[:3], x[3:3], x[3:])
    assert np.allclose([parts.mean, parts.std], [standardizer(x).mean, standardizer(x).std], rtol=1e-12)
    assert standardizer(np.ones((5, 2)))(np.ones((3, 2))).tolist() == [[0, 0]] * 3


def test_normalised_features_have_mean_0_and_length_1_each() -> None:
    x = np.random.default_rng(0).normal(3, 5, (50, 4))
    scaled = normalizer(x)(x)
    assert np.allclose(scaled.mean(axis=1), 0, atol=1e-6)
    assert np.allclose(np.linalg.norm(scaled, axis=1), 1, atol=1e-6)


def test_features_say_how_they_were_made(prepared: LabelledImages, tmp_path: Path) -> None:
    """A classifier that is fitted to them must be used with others of the same kind."""
    params = FeatureParams(pool="average", by_depth=False)
    assert FeatureCache(tmp_path, params, 1.0).features(pixel_source(), prepared).params == params
