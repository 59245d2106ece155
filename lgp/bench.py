"""Benchmark of this machine: training steps, views, linear probing, saving, a pipeline with nothing to do.

Every part runs as users run it: images are prepared, and stages train for a few epochs. The figures are of one run on a
machine that may be shared. Compare ratios within one run (`benchmarks/peers.py`), not figures of two runs.
"""

import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lgp.compute.device import choose_device
from lgp.compute.nested import copied
from lgp.compute.precision import choose_precision
from lgp.compute.randomness import Stream, generator
from lgp.data.labels import LabelledImages, write_labels
from lgp.data.loading import CropDataset
from lgp.data.preparation import prepare
from lgp.data.storage import Images
from lgp.data.views import ColorJitter, color_jitter
from lgp.evaluate.linear import evaluate_linear
from lgp.evaluate.probe import LinearHeads, train_heads
from lgp.features.cache import FeatureCache, FeatureSource
from lgp.features.extraction import by_block_of
from lgp.models.contrastive import build_contrastive
from lgp.models.encoder_folder import save_encoder
from lgp.models.vit import build_encoder
from lgp.params.file import Params, load_params
from lgp.params.pretrain import ViewParams
from lgp.params.run import RunParams
from lgp.pretrain.arm import Session
from lgp.pretrain.cl import pretrain_cl
from lgp.pretrain.graft import pretrain_graft
from lgp.pretrain.mim import pretrain_mim
from lgp.pretrain.plan import matrix_tflops, stage_cost
from lgp.training.loop import Epoch
from lgp.training.resume_states import StateStore
from lgp.workflow.presets import FOLDER

GIB = 2**30
ARMS = ("mim", "cl", "graft")
# MoCo v3's recipe with all operations
RECIPE = ViewParams(
    crop_scale_min=0.08, flip_p=0.5, jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
    grayscale_p=0.2, blur_p=(1.0, 0.1), solarize_p=(0.0, 0.2),
)  # fmt: skip
PHOTO_SIZE = (640, 427)


@dataclass(frozen=True)
class Workload:
    """A size to measure: its name, parameters and batch size."""

    name: str
    params: Params
    batch_size: int


@dataclass
class Clock:
    """An observer that notes when epochs end."""

    ends: list[float] = field(default_factory=list)

    def log_epoch(self, _: Epoch) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def workloads(device: torch.device, quick: bool) -> list[Workload]:
    """List the sizes to measure.

    They are digits, 32×32 at width 192, and 224×224 (ViT-S on a CPU; ViT-B on CUDA, also with a large batch). `quick`
    lists the first two.
    """
    cuda = device.type == "cuda"
    large = load_params(FOLDER / "imagenet-vit-b16.yaml")
    if not cuda:
        small = large.model.model_copy(update={"width": 384, "heads": 6})
        large = large.model_copy(update={"model": small})
    found = [
        Workload("digits, width 64, depth 6", load_params(FOLDER / "digits-paper.yaml"), 64),
        Workload("32×32, width 192, depth 12", load_params(FOLDER / "cifar10.yaml"), 512 if cuda else 64),
        Workload("224×224, " + ("ViT-B/16" if cuda else "ViT-S/16"), large, 256 if cuda else 8),
    ]
    if cuda:
        found.append(Workload("224×224, ViT-B/16, large batch", large, 1024))
    return found[:2] if quick else found


def photographs() -> list[Image.Image]:
    """Return the photographs that scikit-learn ships, 640×427."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def prepared_for(params: Params, images: int, folder: Path) -> Images:
    """Prepare images for these parameters: digits, or random crops of photographs (from 224 pixels on whole ones)."""
    (folder / "prepared").mkdir()
    if params.data.source == ["digits"]:
        prepare(params.data, 0, folder / "prepared", folder / "held_out.csv")
        return Images(folder / "prepared")
    source, rng, size = folder / "source", np.random.default_rng(0), params.data.image_size
    (source / "unlabeled").mkdir(parents=True)
    photos = photographs()
    for i in range(images + 40):
        photo = photos[i % len(photos)]
        left, top = (int(rng.integers(side - size)) for side in PHOTO_SIZE)
        image = photo if size >= 224 else photo.crop((left, top, left + size, top + size))
        part = source / ("unlabeled" if i < images else f"train/{i % 2}")
        part.mkdir(parents=True, exist_ok=True)
        image.save(part / f"{i}.{'jpg' if size >= 224 else 'png'}")
    data = params.data.model_copy(
        update={"source": [str(source)], "val_share": 0.2, "test_share": 0.2, "max_train_images": None}
    )
    prepare(data, 0, folder / "prepared", folder / "held_out.csv")
    shutil.rmtree(source)
    return Images(folder / "prepared")


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lgp-bench-") as folder:
        yield Path(folder)


def shortened(params: Params, batch_size: int, epochs: int) -> Params:
    """Return parameters that train every arm for a few epochs of this batch size."""
    stage = {"batch_size": batch_size, "epochs": epochs, "warmup_epochs": 0}
    workers = min(16, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    run = params.run.model_copy(update={"print_every_s": 1e9, "workers": workers, "processes": 1, "accumulate": {}})
    arms = {arm: getattr(params, arm).model_copy(update=stage) for arm in ARMS}
    return params.model_copy(update={**arms, "run": run, "arms": list(ARMS)})


def train_timed(arm: str, params: Params, data: Images, folder: Path) -> list[float]:
    """Train an arm, and return the seconds of each epoch except the first, which is the warm-up."""
    clock, before = Clock(), folder / "before" / "encoder"
    session = Session(data, params, StateStore(folder / f"state-{arm}", "bench"), clock)
    if arm == "graft":
        save_encoder(
            before, build_encoder(params.model, params.data), params.model, params.data, data.normalization, {}
        )
    if arm == "graft":
        pretrain_graft(session, before, before)
    else:
        {"mim": pretrain_mim, "cl": pretrain_cl}[arm](session)
    return [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]


def _step_row(arm: str, workload: Workload, prepared: Path) -> dict[str, Any]:
    """Measure one arm at one size."""
    device = choose_device(workload.params.run)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = Images(prepared)
    with _scratch() as folder:
        seconds = min(train_timed(arm, workload.params, data, folder))
    images = len(data.pretraining_ids) // workload.batch_size * workload.batch_size
    precision = choose_precision(workload.params.run, device, workload.params.model.width)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / GIB
    else:
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 2**20
    rate = images / seconds
    flops = rate * stage_cost(arm, workload.params).flops_per_image
    return {
        "size": workload.name,
        "arm": arm,
        "batch": workload.batch_size,
        "precision": str(precision).removeprefix("torch."),
        "images_per_s": round(rate, 1),
        "tflops": round(flops / 1e12, 4),
        "share_of_peak": round(flops / 1e12 / matrix_tflops(device, precision), 3),
        "memory_gib": round(memory, 2),
    }


def bench_steps(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Measure the steps of MIM, CL and graft: images per second, share of the matrix peak, memory."""
    rows, steps, epochs = [], 2 if quick else 6, 2 if quick else 3
    for workload in workloads(device, quick):
        params = shortened(workload.params, workload.batch_size, epochs)
        short = Workload(workload.name, params, workload.batch_size)
        with _scratch() as folder:
            prepared_for(params, steps * workload.batch_size, folder)
            for arm in ARMS:
                rows.append(_alone(_step_row, arm, short, folder / "prepared"))
    return rows


def _alone(measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    """Measure in a separate process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(measure, *given).result()


def rate_of(work: Callable[[int], Any], images: int, seconds: float) -> float:
    """Call `work` with 0, 1, 2 … for `seconds`, and return images per second. One call works on `images` images."""
    work(0)
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        calls += 1
        work(calls)
    return images * calls / (time.perf_counter() - started)


def two_views(data: Images, crops: CropDataset) -> Callable[[int], None]:
    """Return the function that makes both views of the batch of a step, with all operations of the recipe."""

    def make(step: int) -> None:
        cut = crops[step].transpose(0, 1).flatten(0, 1).float() / 255
        images = len(cut) // 2
        colours = [ColorJitter.draw(images, view, RECIPE, generator(0, "bench", step, view)) for view in (0, 1)]
        data.normalize(color_jitter(cut, ColorJitter.cat(colours), RECIPE))

    return make


def bench_views(quick: bool) -> list[dict[str, Any]]:
    """Measure how many images per second get two views each on one core."""
    threads, seconds = torch.get_num_threads(), 1.0 if quick else 4.0
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)

    def add(images: str, work: str, make: Callable[[int], Any], batch: int) -> None:
        rows.append({"images": images, "work": work, "images_per_s": round(rate_of(make, batch, seconds))})

    for preset, name, batch in (("cifar10", "32×32", 64), ("imagenet-vit-b16", "JPEG 640×427 → 224×224", 8)):
        with _scratch() as folder:
            data = prepared_for(load_params(FOLDER / f"{preset}.yaml"), 10 * batch, folder)
            crops = CropDataset(data, RECIPE, 2, batch, Stream(0, "bench"))
            add(name, "read and crop", crops.__getitem__, batch)
            add(name, "all", two_views(data, crops), batch)
            if preset != "cifar10":
                data.keep_decoded(GIB)
                for step in range(crops.steps_per_epoch):
                    crops[step]
                add(name, "crop, kept decoded", crops.__getitem__, batch)
    torch.set_num_threads(threads)
    return rows


@dataclass(frozen=True)
class ProbeSize:
    """Features to probe. `measured` of the `images` of an epoch are trained on."""

    name: str
    images: int
    width: int
    classes: int
    batch_size: int
    measured: int


PROBES = (
    ProbeSize("small", 50_000, 192, 10, 256, 50_000),
    ProbeSize("small", 50_000, 192, 10, 1024, 50_000),
    ProbeSize("ImageNet, ViT-B", 1_281_167, 768, 1000, 1024, 4096),
)


def bench_probe(size: ProbeSize, heads: int = 70) -> dict[str, Any]:
    """Measure an epoch of the linear probe's heads as one product, and the usual way, one head after the other.

    The one product reads the features from a memory-mapped file in half precision. The usual way is torch's own layer,
    cross-entropy and SGD. It is measured with a DataLoader over the features in memory, and with ready batches. One
    head is timed, and the time is multiplied by the number of heads. Call this in a separate process, so that its peak
    memory is its own.
    """
    device = choose_device(RunParams())
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rng = np.random.default_rng(0)
    labels = rng.integers(0, size.classes, size.measured)
    precision = choose_precision(RunParams(), device, size.width)
    settings = [(0.1, 0.0), (0.1, 1e-6)] * (heads // 2)
    model = LinearHeads(size.width, size.classes, settings, False, torch.Generator().manual_seed(0)).to(device)
    with _scratch() as folder:
        np.save(folder / "features.npy", rng.normal(size=(size.measured, size.width)).astype(np.float16))
        features = np.load(folder / "features.npy", mmap_mode="c")
        few = 2 * size.batch_size
        train_heads(model, features[:few], labels[:few], 1, size.batch_size, 0, precision)
        started = _now(device)
        train_heads(model, features, labels, 1, size.batch_size, 0, precision)
        times = size.images / size.measured
        together = (_now(device) - started) * times
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / GIB
        else:
            memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 2**20
        in_memory = np.asarray(features, dtype=np.float32)
    with_loader, ready = (_one_head(in_memory, labels, size, device, how) * heads * times for how in (True, False))
    return {
        "features": size.name,
        "images": size.images,
        "measured": size.measured,
        "width": size.width,
        "classes": size.classes,
        "batch": size.batch_size,
        "precision": str(precision).removeprefix("torch."),
        "epoch_s": round(together, 3),
        "memory_gib": round(memory, 2),
        "one_by_one_epoch_s": round(with_loader, 2),
        "ratio": round(with_loader / together, 1),
        "one_by_one_ready_batches_s": round(ready, 2),
        "ratio_ready": round(ready / together, 1),
        "sweep_90_epochs_h": round(90 * together / 3600, 3),
    }


def _now(device: torch.device) -> float:
    """Wait until the device has finished its work, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _one_head(features: np.ndarray, labels: np.ndarray, size: ProbeSize, device: torch.device, loader: bool) -> float:
    """Time an epoch of one head, in seconds."""
    head = nn.Linear(size.width, size.classes).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    batches = DataLoader(TensorDataset(x, y), size.batch_size, shuffle=True) if loader else zip(
        x.split(size.batch_size), y.split(size.batch_size), strict=True
    )  # fmt: skip
    started = _now(device)
    for of_batch, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(head(of_batch.to(device)), targets.to(device)).backward()
        optimizer.step()
    return _now(device) - started


def bench_linear(device: torch.device) -> dict[str, Any]:
    """Measure linear probing on digits: first the features of train, val and test, then the sweep and k-NN."""
    params = load_params(FOLDER / "digits.yaml")
    with _scratch() as folder:
        images, labels = prepared_for(params, 0, folder), folder / "labels"
        labels.mkdir()
        write_labels(params.labels, params.data, images, 0, labels)
        data = LabelledImages(images.folder, labels)
        started = time.perf_counter()
        encoder = build_encoder(params.model, params.data)
        depth = params.model.depth
        source = FeatureSource("bench", depth, lambda: by_block_of(encoder, "class_token", depth, device))
        features = FeatureCache(folder / "features", params.features, 1.0).features(source, data)
        extracted = time.perf_counter()
        evaluate_linear(features, params.linear, params.seed, device, params.run)
        probed = time.perf_counter()
    return {
        "images": sum(len(x) for x in features.x.values()),
        "width": params.model.width,
        "features_s": round(extracted - started, 3),
        "probe_s": round(probed - extracted, 3),
    }


def bench_resume(device: torch.device) -> dict[str, Any]:
    """Measure the time to write and to read a resume state of the contrastive model at width 192."""
    params = load_params(FOLDER / "cifar10.yaml")
    model = build_contrastive(build_encoder(params.model, params.data), params.contrastive).to(device)
    moments = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    state = {
        "model": model.state_dict(),
        "optimizer": {"exp_avg": moments, "exp_avg_sq": {n: m.clone() for n, m in moments.items()}},
    }
    with _scratch() as folder:
        store = StateStore(folder, "bench")
        store.save(state)
        started = time.perf_counter()
        store.save(state)
        saved = time.perf_counter()
        copied(store.read(), torch.device("cpu"))
        read = time.perf_counter()
        size = store.latest.stat().st_size
    return {
        "state_mib": round(size / 2**20, 1),
        "save_s": round(saved - started, 3),
        "load_s": round(read - saved, 3),
        "share_of_time_at_60_s": round((saved - started) / 60, 4),
    }


def bench_pipeline() -> dict[str, Any]:
    """Measure `dvc repro` with nothing to do; None where a stage would run."""
    dvc = [sys.executable, "-m", "dvc"]
    try:
        status = subprocess.run(
            [*dvc, "status", "--json"], capture_output=True, check=True, encoding="utf-8", errors="surrogateescape"
        ).stdout
        if json.loads(status):
            return {"dvc_repro_s": None}
        started = time.perf_counter()
        subprocess.run([*dvc, "repro"], capture_output=True, check=True)
    except (subprocess.CalledProcessError, json.JSONDecodeError):
        return {"dvc_repro_s": None}
    return {"dvc_repro_s": round(time.perf_counter() - started, 2)}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine, with its measured peak of matrix products."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "peak_fp32_tflops": round(matrix_tflops(device, torch.float32), 4),
        "peak_bf16_tflops": round(matrix_tflops(device, torch.bfloat16), 4),
    }


def bench(quick: bool) -> dict[str, Any]:
    """Measure every part. It takes minutes, or about one minute with `quick`."""
    device = choose_device(load_params(FOLDER / "imagenet-vit-b16.yaml").run)
    return {
        "machine": machine(device),
        "steps": bench_steps(device, quick),
        "views_per_core": bench_views(quick),
        "linear_probe": [bench_linear(device)],
        "seventy_heads": [_alone(bench_probe, size) for size in (PROBES[:1] if quick else PROBES)],
        "resume": [bench_resume(device)],
        "nothing_to_do": [bench_pipeline()],
    }


def markdown(result: dict[str, Any]) -> str:
    """Write a result as tables."""
    about = result["machine"]
    lines = [f"# Benchmark, {about['date']}, {about['device']}", ""]
    lines += [", ".join(f"{key.replace('_', ' ')} {value}" for key, value in list(about.items())[2:]), ""]
    for name, rows in result.items():
        if name != "machine":
            cells = [list(rows[0]), ["---"] * len(rows[0]), *([_text(v) for v in row.values()] for row in rows)]
            lines += [f"## {name.replace('_', ' ').capitalize()}", ""]
            lines += [f"| {' | '.join(c.replace('_', ' ') for c in row)} |" for row in cells] + [""]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "not measured: run `dvc repro` first"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write a result as JSON and Markdown into `folder`, and return the path of the Markdown file."""
    folder.mkdir(parents=True, exist_ok=True)
    about = result["machine"]
    stem = f"{about['date']}-{about['device'].replace(' ', '-').lower()}"
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    page = folder / f"{stem}.md"
    page.write_text(markdown(result), encoding="utf-8")
    return page
