"""What reading takes at the scale of ImageNet. Each part compares what was before with what is now, in one run.

| `python benchmarks/input.py` | before | now |
|---|---|---|
| `loading` | each worker reads whole batches of `--batch` pairs of crops of 224 × 224 | all share each batch in parts |
| `features` | one thread decodes, and then computes | `--workers` decode while features are computed |
| `resume` | every process reads a state of `--mib` MiB as bytes | one maps it and sends its tensors |
"""

import argparse
import functools
import io
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lgp import bench
from lgp.compute.distributed import send_bytes, send_state
from lgp.compute.nested import copied
from lgp.compute.randomness import Stream
from lgp.data.loading import PART_BYTES, CropDataset, loader
from lgp.data.storage import Images
from lgp.features.extraction import Running, extract, features_of
from lgp.models.vit import build_encoder
from lgp.params.file import load_params
from lgp.training.optimizer import adamw
from lgp.training.resume_states import DIGEST_BYTES, StateStore
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


def features(images: int, workers: int, rounds: int, depth: int) -> dict[str, Any]:
    """Compare features of photographs that this process reads with those that workers read, in turns.

    `decode_ms` and `both_ms` are the time of a core, of one thread, for an image without and with its features.
    """
    params, cpu = load_params(FOLDER / "imagenet-vit-b16.yaml"), torch.device("cpu")
    model = params.model.model_copy(update={"width": 192, "heads": 3, "depth": depth})
    encode = features_of(build_encoder(model, params.data), cpu)
    found: dict[str, Any] = {"images": images, "workers": workers, "alone_s": [], "helped_s": []}
    with tempfile.TemporaryDirectory() as folder:
        data = bench.prepared_for(params, images, Path(folder))
        ids = data.pretraining_ids[:images]
        for part, work in (("decode_ms", lambda _: torch.zeros(1, 1)), ("both_ms", encode)):
            started = time.process_time()
            extract(work, data, ids)
            found[part] = round((time.process_time() - started) / images * 1000, 2)
        for _ in range(rounds):
            results = []
            for name, running in (("alone_s", Running()), ("helped_s", Running(workers))):
                started = time.perf_counter()
                results.append(extract(encode, data, ids, running=running))
                found[name].append(round(time.perf_counter() - started, 2))
            assert np.array_equal(*results)
    return found


def _network(mib: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return layers whose weights and two moments have so many MiB together."""
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(mib // 12)))
    optimizer = adamw([{"params": list(layers.parameters()), "lr": 1e-3}], (0.9, 0.95))
    return layers, optimizer


def _resumed_before(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    data = StateStore(folder, "bench").latest.read_bytes() if _first() else None
    payload = send_bytes(data[:-DIGEST_BYTES] if data is not None else None)
    assert payload is not None
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def _resumed_now(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    cpu = torch.device("cpu")
    state = send_state(StateStore(folder, "bench").read() if _first() else None, cpu)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(copied(state["optimizer"], cpu) if _first() else state["optimizer"])


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _memory(kind: str) -> int:
    """Return the memory of this process, in KiB: `RssAnon` without mapped files, `VmRSS` with them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1])


def _most(kind: str, most: list[int], over: threading.Event) -> None:
    while not over.wait(0.002):
        most[0] = max(most[0], _memory(kind))


def _resuming(rank: int, processes: int, port: int, how: str, mib: int, folder: str) -> None:
    """Go on from a state, and write the most memory that it took beyond that of the fresh weights."""
    if processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group("gloo", rank=rank, world_size=processes)
    model, optimizer = _network(mib)
    figures: dict[str, Any] = {}
    most, over = {kind: [0] for kind in ("RssAnon", "VmRSS")}, threading.Event()
    before = {kind: _memory(kind) for kind in most}
    looking = [threading.Thread(target=_most, args=(kind, of_kind, over)) for kind, of_kind in most.items()]
    for thread in looking:
        thread.start()
    started = time.perf_counter()
    {"before": _resumed_before, "now": _resumed_now}[how](Path(folder), model, optimizer)
    figures["seconds"] = round(time.perf_counter() - started, 2)
    over.set()
    for thread in looking:
        thread.join()
    figures |= {f"{kind}_mib": round((of_kind[0] - before[kind]) / 1024) for kind, of_kind in most.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(figures), encoding="utf-8")
    if processes > 1:
        dist.destroy_process_group()


def resume(mib: int, processes: int) -> dict[str, Any]:
    """Compare the memory and time with which one process, and several, go on from a state."""
    found: dict[str, Any] = {"state_mib": mib}
    with tempfile.TemporaryDirectory() as folder:
        model, optimizer = _network(mib)
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()
        StateStore(Path(folder), "bench").save({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        for count in (1, processes):
            for how in ("before", "now"):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", 0))
                    port = s.getsockname()[1]
                mp.spawn(_resuming, args=(count, port, how, mib, folder), nprocs=count)
                of_ranks = [json.loads(Path(folder, f"{r}.json").read_text(encoding="utf-8")) for r in range(count)]
                found[f"{count} processes, {how}"] = of_ranks
    return found


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["loading", "features", "resume"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--depth", type=int, default=12, help="of the encoder of `features`, 192 wide")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--computes-s", type=float, default=0.0, help="what the training of a step takes, elsewhere")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--mib", type=int, default=504)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    parts = {
        "loading": functools.partial(loading, given.batch, given.workers, given.steps, given.rounds, given.computes_s),
        "features": functools.partial(features, given.images, given.workers, given.rounds, given.depth),
        "resume": functools.partial(resume, given.mib, given.processes),
    }
    print(json.dumps(parts[given.part](), indent=2))


if __name__ == "__main__":
    main()
