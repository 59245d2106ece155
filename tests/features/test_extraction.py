"""Features batch by batch: read by workers, in a precision, on a device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lgp.compute.precision import choose_frozen_precision
from lgp.data.labels import LabelledImages
from lgp.data.storage import Images
from lgp.evaluate import fine_tuning
from lgp.features import cache, extraction, online_knn
from lgp.features.cache import FeatureCache, FeatureSource, pixel_source
from lgp.features.extraction import ALONE, Running, all_runnings, extract, pixels
from lgp.features.of_encoder import encoder_features, encoder_source
from lgp.features.online_knn import OnlineKnn
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params
from lgp.params.run import OnlineKnnParams, RunParams
from lgp.pretrain import cut

CPU, CARD = torch.device("cpu"), torch.device("cuda")
SETTINGS = RunParams(device="cpu", workers=3)
HELPED = Running(3, CPU)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_workers_give_the_same_batches_and_features(
    photographs: Images, interpolation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, seen = np.tile(photographs.ids("train"), 2), list[Tensor]()
    monkeypatch.setattr(extraction, "BATCH", 5)
    monkeypatch.setattr(extraction, "FEW", 4)

    def encode(images: Tensor) -> Tensor:
        seen.append(images)
        return pixels(images)

    alone = extract(encode, photographs, ids, interpolation)
    of_alone = seen.copy()
    assert [len(batch) for batch in of_alone] == [5] * (len(ids) // 5) + [len(ids) % 5] * bool(len(ids) % 5)
    assert np.array_equal(alone, pixels(photographs.normalize(photographs.whole(ids, interpolation))).numpy())
    for workers, part_bytes in ((1, 1), (2, 2 * 3 * 64), (3, 2**20)):
        monkeypatch.setattr(extraction, "PART_BYTES", part_bytes)
        seen.clear()
        assert np.array_equal(extract(encode, photographs, ids, interpolation, Running(workers)), alone)
        assert all(torch.equal(a, b) for a, b in zip(of_alone, seen, strict=True))


@pytest.mark.parametrize(
    ("images", "few", "workers", "parts"),
    [
        (12, 12, 0, [slice(0, 8)]),  # few images: this process reads whole batches
        (12, 11, 3, [slice(0, 3), slice(3, 6), slice(6, 8)]),
        (3, 2, 1, [slice(0, 3)]),  # no more workers than there are parts
    ],
)
def test_only_many_images_are_worth_workers(
    prepared: LabelledImages,
    images: int,
    few: int,
    workers: int,
    parts: list[slice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def noted(_data: Images, _read: Any, steps: range, parts_of: Any, *how: Any) -> list[Tensor]:
        asked.append((steps, parts_of(0), *how))
        return [torch.zeros(1, 1, 8, 8, dtype=torch.uint8)]

    monkeypatch.setattr(extraction, "read_batches", noted)
    for name, value in (("BATCH", 8), ("FEW", few), ("PART_BYTES", 3 * 64)):
        monkeypatch.setattr(extraction, name, value)
    extract(pixels, prepared, np.arange(images), running=HELPED)
    assert asked == [(range(-(-images // 8)), parts, workers, CPU)]


def test_products_are_in_the_precision_and_features_in_single(prepared: LabelledImages) -> None:
    layer, seen = nn.Linear(64, 3), list[torch.dtype]()

    def encode(images: Tensor) -> Tensor:
        features: Tensor = layer(images.flatten(1))
        seen.append(features.dtype)
        return features

    ids = prepared.ids("val")
    single, half = (
        extract(encode, prepared, ids, running=Running(precision=p)) for p in (torch.float32, torch.bfloat16)
    )
    assert seen == [torch.float32, torch.bfloat16]
    assert single.dtype == half.dtype == np.float32
    assert 0 < np.abs(single - half).max() < 0.05


def test_precision_on_a_cpu_is_single_whatever_the_cpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for native in ("torch.cpu._is_avx512_bf16_supported", "torch.cpu._is_amx_tile_supported"):
        monkeypatch.setattr(native, lambda: True)
    for precision in ("auto", "fp32", "bf16"):
        assert choose_frozen_precision(RunParams(precision=precision), CPU) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    found = [Running.of(RunParams(precision=p, workers=2), CARD) for p in ("auto", "fp32", "bf16")]
    assert found == [Running(2, CARD, dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    assert Running.of(SETTINGS, CPU) == HELPED


def test_device_and_precision_decide_the_cached_features_and_workers_do_not(encoder_folder: Path) -> None:
    digests = [encoder_source(encoder_folder, FeatureParams(), running).digest for running in all_runnings()]
    assert len(set(digests)) == 3
    assert encoder_source(encoder_folder, FeatureParams(), HELPED).digest == digests[0]
    assert [(r.device.type, r.precision) for r in all_runnings()] == [
        ("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16),
    ]  # fmt: skip


class AskedError(Exception):
    """Ends what was asked for, as soon as it was noted."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Running]:
    """How features were to be computed."""
    found: list[Running] = []

    def noted(*_: Any, running: Running = ALONE) -> Any:
        found.append(running)
        raise AskedError

    monkeypatch.setattr(cache, "extracted", noted)
    for module in (online_knn, cut):
        monkeypatch.setattr(module, "extract", noted)
    monkeypatch.setattr(fine_tuning, "extract", lambda *about: noted(running=about[4]))
    return found


def helped(params: Params) -> Params:
    return params.model_copy(update={"run": params.run.model_copy(update={"workers": 3, "device": "cpu"})})


def test_cached_features_are_computed_as_the_run_asks(
    prepared: LabelledImages,
    encoder_folder: Path,
    params: Params,
    tmp_path: Path,
    asked: list[Running],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(AskedError):
        encoder_features(encoder_folder, prepared, helped(params), CPU)
    for source in (pixel_source(2), FeatureSource("x", 1, lambda: pixels)):
        with pytest.raises(AskedError):
            FeatureCache(tmp_path / "own", FeatureParams(), 1.0).features(source, prepared)
    assert asked == [HELPED, Running(2), ALONE]


def test_online_knn_is_computed_as_the_run_asks(
    prepared: LabelledImages, asked: list[Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AskedError):
        OnlineKnn(prepared, OnlineKnnParams(), HELPED).top1(pixels)
    assert asked == [HELPED]
    devices: list[Any] = []
    monkeypatch.setattr(online_knn, "extract", extract)
    monkeypatch.setattr(
        online_knn, "knn_predict", lambda *about: devices.append(about[6]) or np.zeros(len(about[2]), dtype=int)
    )
    OnlineKnn(prepared, OnlineKnnParams(), Running()).top1(pixels)
    assert devices == [CPU]


def test_predictions_and_features_by_block_are_computed_as_the_run_asks(
    prepared: LabelledImages, encoder_folder: Path, params: Params, asked: list[Running]
) -> None:
    with pytest.raises(AskedError):
        cut.knn_by_block(encoder_folder, prepared, helped(params))

    shared = SimpleNamespace(
        data=prepared,
        device=CPU,
        session=SimpleNamespace(params=helped(params)),
        recipe=SimpleNamespace(interpolation="bilinear"),
    )
    with pytest.raises(AskedError):
        fine_tuning.predict(nn.Identity(), shared)  # type: ignore[arg-type]
    assert asked == [HELPED, HELPED]
