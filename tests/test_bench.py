"""The benchmark measures what it says, and writes it down; how fast is not tested."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import merged

from lgp import bench
from lgp.compute.randomness import Stream
from lgp.data.loading import CropDataset
from lgp.data.views import ColorJitter
from lgp.params.file import Params, load_params
from lgp.workflow.presets import FOLDER


def at(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """Let the benchmark's clock show these times, one each time it is read."""
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=iter(times).__next__))


@pytest.mark.parametrize("arm", bench.ARMS)
def test_a_training_is_timed_epoch_by_epoch_but_for_the_first(
    arm: str, tmp_path: Path, values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = bench.shortened(Params.model_validate(merged(values, {"data": {"max_train_images": 200}})), 64, 3)
    data = bench.prepared_for(params, 0, tmp_path)
    at(monkeypatch, 10.0, 13.0, 20.0)  # an epoch's end each
    assert bench.train_timed(arm, params, data, tmp_path) == [3.0, 7.0]


@pytest.mark.parametrize(("preset", "encoded"), [("cifar10", False), ("imagenet-vit-b16", True)])
def test_photographs_are_prepared_and_get_two_views(
    preset: str, encoded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bench.prepared_for(load_params(FOLDER / f"{preset}.yaml"), 8, tmp_path)
    assert len(data.pretraining_ids) >= 8
    assert bool(list(data.folder.glob("*.arrow"))) == encoded
    if encoded:
        assert set(map(tuple, data.sizes.tolist())) == {bench.PHOTO_SIZE[::-1]}
    given: list[tuple[torch.Tensor, ColorJitter]] = []
    apply = bench.color_jitter
    monkeypatch.setattr(bench, "color_jitter", lambda x, jitter, p: given.append((x, jitter)) or apply(x, jitter, p))  # type: ignore[func-returns-value]
    crops = CropDataset(data, bench.RECIPE, 2, 4, Stream(0, "bench"))
    make = bench.two_views(data, crops)
    for step in (0, 1):
        make(step)
        images, jitter = given[step]
        assert torch.equal(images, torch.cat([crops[step][:, 0], crops[step][:, 1]]).float() / 255)
        assert jitter.blur[:4].all()  # of the first view always, of the second at times
        assert len(jitter.blur) == 8
    assert not torch.equal(given[0][1].factors, given[1][1].factors)


def test_sizes_are_those_of_the_presets() -> None:
    cpu, cuda = (bench.workloads(torch.device(kind), quick=False) for kind in ("cpu", "cuda"))
    assert [(w.params.model.width, w.params.model.depth) for w in cpu] == [(64, 6), (192, 12), (384, 12)]
    assert [(w.params.model.width, w.batch_size) for w in cuda] == [(64, 64), (192, 512), (768, 256), (768, 1024)]
    assert len(bench.workloads(torch.device("cpu"), quick=True)) == 2


def test_heads_are_timed_as_one_product_and_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of 200 images is twice the 100 that are measured; one by one there are four heads."""
    together: list[tuple[int, int]] = []
    train, step, steps = bench.train_heads, torch.optim.SGD.step, []

    def watched(model: Any, features: Any, *rest: Any) -> None:
        together.append((len(model.settings), len(features)))
        train(model, features, *rest)
        steps.clear()

    def counted(self: torch.optim.SGD, *rest: Any) -> Any:
        steps.append(len(self.param_groups))
        return step(self, *rest)

    monkeypatch.setattr(bench, "train_heads", watched)
    monkeypatch.setattr(torch.optim.SGD, "step", counted)
    times = iter([0.0, 2.0, 10.0, 16.0, 20.0, 23.0])  # together, with a loader, with ready batches
    monkeypatch.setattr(bench, "_now", lambda _: next(times))
    row = bench.bench_probe(bench.ProbeSize("tiny", 200, 8, 3, 32, 100), heads=4)
    assert together == [(4, 64), (4, 100)]  # two batches to warm up, then all
    assert len(steps) == 2 * 4  # batches of 32 of 100 images, both ways
    assert row["epoch_s"] == 2 * 2
    assert (row["one_by_one_epoch_s"], row["ratio"]) == (6 * 4 * 2, 12)
    assert (row["one_by_one_ready_batches_s"], row["ratio_ready"]) == (3 * 4 * 2, 6)
    assert row["sweep_90_epochs_h"] == 90 * 4 / 3600


def test_rate_counts_images_of_whole_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    # started; before each call; the look that ends it; the end
    at(monkeypatch, 0.0, 0.001, 0.004, 0.008, 0.012, 0.02)
    assert bench.rate_of(calls.append, 10, 0.01) == pytest.approx(10 * 3 / 0.02)
    assert calls == [0, 1, 2, 3]  # the first warms up and does not count


def test_linear_probing_is_timed_on_all_evaluated_images(monkeypatch: pytest.MonkeyPatch, values: Any) -> None:
    params = Params.model_validate(merged(values, {"linear": {"epochs": 1}}))
    monkeypatch.setattr(bench, "load_params", lambda _: params)
    at(monkeypatch, 1.0, 3.0, 10.0)
    row = bench.bench_linear(torch.device("cpu"))
    assert row == {"images": 300, "width": 16, "features_s": 2.0, "probe_s": 7.0}


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
