"""What reading takes at the scale of ImageNet: batches that workers read whole and in parts, and their memory.

`python benchmarks/input.py loading` compares in one run, in turns, batches of `--batch` pairs of crops of 224 × 224
that each worker reads whole, as up to version 0.1, with batches that all workers read in parts.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lgp import bench
from lgp.compute.randomness import Stream
from lgp.data.loading import PART_BYTES, CropDataset, loader
from lgp.data.storage import Images
from lgp.params.file import load_params
from lgp.workflow.presets import FOLDER

WHOLE = 2**62  # bytes of a part that is a whole batch
SHARED = "/dev/shm"
MIB = 2**20


class SharedMemory:
    """The most shared memory that is used beyond what was used before, in bytes."""

    def __init__(self) -> None:
        """Begin at what is used now."""
        self.before = self._used()
        self.most, self._over = 0, threading.Event()

    @staticmethod
    def _used() -> int:
        return shutil.disk_usage(SHARED).used

    @contextmanager
    def watched(self) -> Iterator["SharedMemory"]:
        """Look every few milliseconds during the block."""
        looking = threading.Thread(target=self._look)
        looking.start()
        try:
            yield self
        finally:
            self._over.set()
            looking.join()

    def _look(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, self._used() - self.before)


def read(data: Images, batch: int, workers: int, steps: int, part_bytes: int, computes_s: float) -> dict[str, float]:
    """Read some batches after a first one. The training of a step takes `computes_s`, and leaves the CPU alone."""
    crops = CropDataset(data, bench.RECIPE, 2, batch, Stream(0, "bench"))
    with SharedMemory().watched() as memory:
        batches = loader(crops, 0, steps + 1, workers, torch.device("cpu"), part_bytes)
        next(batches)
        started = time.perf_counter()
        for _ in batches:
            time.sleep(computes_s)
        seconds = time.perf_counter() - started
    return {"images_per_s": round(batch * steps / seconds, 1), "shared_mib": round(memory.most / MIB, 1)}


def loading(batch: int, workers: int, steps: int, rounds: int, computes_s: float) -> dict[str, Any]:
    """Compare whole batches with parts, in turns."""
    found: dict[str, list[dict[str, float]]] = {"whole": [], "parts": []}
    with tempfile.TemporaryDirectory() as folder:
        data = bench.prepared_for(load_params(FOLDER / "imagenet-vit-b16.yaml"), 2 * batch, Path(folder))
        for _ in range(rounds):
            for how, part_bytes in (("whole", WHOLE), ("parts", PART_BYTES)):
                found[how].append(read(data, batch, workers, steps, part_bytes, computes_s))
    return {"batch": batch, "workers": workers, "steps": steps, "computes_s": computes_s, **found}


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["loading"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--computes-s", type=float, default=0.0)
    given = parser.parse_args()
    print(json.dumps(loading(given.batch, given.workers, given.steps, given.rounds, given.computes_s), indent=2))


if __name__ == "__main__":
    main()
