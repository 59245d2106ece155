"""Measure training steps on this machine's GPU within a time limit: MIM and CL, eager and compiled, and a profile.

    python benchmarks/gpu_speed.py FOLDER [--seconds 90] [--only 224] [--quick]

Writes FOLDER/speeds.json after each row, so that whatever ends it leaves what it has measured. `lgp bench` measures
more, in minutes. `--quick` is for a CPU: digits alone.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lgp import bench
from lgp.compute.device import choose_device
from lgp.compute.precision import choose_precision
from lgp.data.storage import Images
from lgp.params.run import RunParams
from lgp.pretrain.plan import matrix_tflops, stage_cost

STEPS, EPOCHS = 8, 4


def workloads(device: torch.device, quick: bool) -> list[tuple[bench.Workload, bool]]:
    """List sizes, each eager and compiled; the most important first. The 32×32 one decides the epochs of CIFAR-10."""
    digits, small, large, *_ = bench.workloads(device, quick=False)
    if quick:
        return [(digits, False)]
    return [(small, False), (large, False), (small, True), (large, True)]


def measured(workload: bench.Workload, compiled: bool, data: Images, arm: str, device: torch.device) -> dict[str, Any]:
    """Train for a few epochs and return the speed of the fastest and of the last one, compute and memory."""
    params = bench.shortened(workload.params, workload.batch_size, EPOCHS)
    params = params.model_copy(update={"run": params.run.model_copy(update={"compile": compiled})})
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        seconds = bench.train_timed(arm, params, data, Path(folder))
    images = len(data.pretraining_ids) // workload.batch_size * workload.batch_size
    flops = images / min(seconds) * stage_cost(arm, params).flops_per_image
    precision = choose_precision(params.run, device, params.model.width)
    peak = matrix_tflops(device, precision)
    return {
        "size": workload.name,
        "arm": arm,
        "batch": workload.batch_size,
        "compiled": compiled,
        "precision": str(precision).removeprefix("torch."),
        "images_per_s": round(images / min(seconds), 1),
        "images_per_s_last": round(images / seconds[-1], 1),
        "tflops": round(flops / 1e12, 2),
        "share_of_peak": round(flops / 1e12 / peak, 3),
        "first_epoch_s": round(time.perf_counter() - started - sum(seconds), 1),
        "memory_gib": round(torch.cuda.max_memory_allocated() / bench.GIB, 2) if device.type == "cuda" else None,
    }


def rows(device: torch.device, quick: bool, only: str) -> Iterator[dict[str, Any]]:
    """Measure one row after another, of the sizes whose names begin with `only`."""
    with tempfile.TemporaryDirectory() as folder:
        prepared: dict[str, Images] = {}
        for workload, compiled in workloads(device, quick):
            if not workload.name.startswith(only):
                continue
            if workload.name not in prepared:
                place = Path(folder) / str(len(prepared))
                place.mkdir()
                prepared[workload.name] = bench.prepared_for(workload.params, STEPS * workload.batch_size, place)
            for arm in ("mim", "cl"):
                yield measured(workload, compiled, prepared[workload.name], arm, device)


def profile(device: torch.device, quick: bool) -> str:
    """Return the ten operations that take the most time of CL at the smallest measured size, as a table."""
    workload = workloads(device, quick)[0][0]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        data = bench.prepared_for(workload.params, 4 * workload.batch_size, Path(folder))
        params = bench.shortened(workload.params, workload.batch_size, 2)
        with torch.profiler.profile(activities=activities) as profiler:
            bench.train_timed("cl", params, data, Path(folder))
    by = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    head = f"CL, {workload.name}, 8 steps and the states that they save, eager\n"
    return head + profiler.key_averages().table(sort_by=by, row_limit=15)


def main() -> None:
    """Measure until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=90, help="no row begins later")
    parser.add_argument("--only", default="", help="sizes whose names begin with it")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    started, device = time.monotonic(), choose_device(RunParams())
    found: list[dict[str, Any]] = []
    result = {"machine": bench.machine(device), "steps": found}
    for row in rows(device, args.quick, args.only):
        found.append(row)
        (args.folder / "speeds.json").write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(row), flush=True)
        if time.monotonic() - started > args.seconds:
            break
    (args.folder / "profile.txt").write_text(profile(device, args.quick))


if __name__ == "__main__":
    main()
