"""The benchmark measures what it says, and writes it down; how fast is not tested."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import merged

from lgp import bench
from lgp.data.loading import CropDataset
from lgp.params.file import Params, load_params
from lgp.workflow.presets import FOLDER


@pytest.mark.parametrize("arm", bench.ARMS)
def test_a_training_is_timed_epoch_by_epoch_but_for_the_first(arm: str, tmp_path: Path, values: Any) -> None:
    params = bench.shortened(Params.model_validate(merged(values, {"data": {"max_train_images": 200}})), 64, 3)
    data = bench.prepared_for(params, 0, tmp_path)
    seconds = bench.train_timed(arm, params, data, tmp_path)
    assert len(seconds) == 2
    assert min(seconds) > 0


@pytest.mark.parametrize(("preset", "encoded"), [("cifar10", False), ("imagenet-vit-b16", True)])
def test_photographs_are_prepared_and_get_two_views(preset: str, encoded: bool, tmp_path: Path) -> None:
    data = bench.prepared_for(load_params(FOLDER / f"{preset}.yaml"), 8, tmp_path)
    assert len(data.pretraining_ids) >= 8
    assert bool(list(data.folder.glob("*.arrow"))) == encoded
    if encoded:
        assert set(map(tuple, data.sizes.tolist())) == {bench.PHOTO_SIZE[::-1]}
    bench.two_views(data, CropDataset(data, bench.RECIPE, 2, 4, 0, "bench"))(0)


def test_sizes_are_those_of_the_presets() -> None:
    cpu, cuda = (bench.workloads(torch.device(kind), quick=False) for kind in ("cpu", "cuda"))
    assert [(w.params.model.width, w.params.model.depth) for w in cpu] == [(64, 6), (192, 12), (384, 12)]
    assert [(w.params.model.width, w.batch_size) for w in cuda] == [(64, 64), (192, 512), (768, 256), (768, 1024)]
    assert len(bench.workloads(torch.device("cpu"), quick=True)) == 2


def test_heads_are_timed_as_one_product_and_one_by_one() -> None:
    row = bench.bench_probe(bench.ProbeSize("tiny", 200, 8, 3, 32, 100), heads=4)
    assert row["ratio"] == pytest.approx(row["one_by_one_epoch_s"] / row["epoch_s"], rel=0.5)
    assert row["sweep_90_epochs_h"] >= 0


def test_rate_counts_images_of_whole_calls() -> None:
    calls: list[int] = []
    rate = bench.rate_of(calls.append, 10, 0.01)
    assert calls == list(range(len(calls)))
    assert rate > 0


def test_result_is_written_as_data_and_as_tables(tmp_path: Path) -> None:
    result = {
        "machine": {"date": "2026-01-02", "device": "Some GPU", "cores": 2},
        "steps": [{"size": "digits", "images_per_s": 1234.5}],
        "resume": [bench.bench_resume(torch.device("cpu"))],
        "nothing_to_do": [{"dvc_repro_s": None}],
    }
    page = bench.write(result, tmp_path / "benchmarks")
    assert page.name == "2026-01-02-some-gpu.md"
    assert json.loads(page.with_suffix(".json").read_text()) == result
    text = page.read_text()
    assert "| size | images per s |" in text
    assert "| digits | 1,234.5 |" in text
    assert "not measured: run `dvc repro` first" in text
