"""CIFAR-10 at width 192 on one GPU within minutes: MIM and graft beside CL, then the evaluations that fit.

    python benchmarks/gpu_cifar.py SOURCE FOLDER [--train-seconds 270] [--limit 520] [--speeds speeds.json]

SOURCE has CIFAR-10 as Parquet or as folders. FOLDER becomes a project: parameters, data, models, metrics. CL runs at
the same time as MIM and graft, and has at least the compute of both. The epochs follow from measured speeds, or from
`--epochs`. The arm `pixels` and MIM are evaluated while the others train. What is not done at the limit is stopped.
The same command goes on: it skips what is there, and trainings go on from their states.

With `--beside OBJECTIVE`, FOLDER/OBJECTIVE becomes a project too. It has the same data and MIM, and a graft by another
objective, at one rate and with the compute of the first graft.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgp.params.editing import write_values
from lgp.params.file import Params, load_params
from lgp.pretrain.plan import stage_cost
from lgp.pretrain.speed import images_per_second
from lgp.workflow.presets import FOLDER as PRESETS

CORES = os.cpu_count() or 1
ARMS = ("pixels", "mim", "cl", "graft")
FEW = ("1pct", "10pct")
SELECTED = "1pct"
STARTS_S = 60.0  # Python, data, and the compilation of a training
COMPILED_GAIN = 1.1  # a compiled training must be faster by this factor
EAGER = "params-eager.yaml"
PACKED = ("params.yaml", "times.json", "metrics", "predictions", "models/*/metrics.json", "models/*/curves.csv",
          "models/mim/reconstructions.safetensors", "reports", "logs")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of the job.
        command: arguments of `lgp`.
        writes: it is done if this exists.
        needs: names of jobs that come before it.
        threads: of its products on the CPU.
        nice: 0, or 10 for a job beside the trainings.
        folder: the project, below that of the runner.
    """

    name: str
    command: tuple[str, ...]
    writes: Path
    needs: tuple[str, ...]
    threads: int = 2
    nice: int = 0
    folder: Path = Path()


@dataclass
class Runner:
    """Runs jobs, each as soon as those before it are done, until the limit."""

    folder: Path
    deadline: float
    times: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    places: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(max(2, CORES)))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, jobs: list[Job]) -> None:
        """Run all jobs. Their order is one in which they could run one by one."""
        futures: dict[str, Future[bool]] = {}
        with ThreadPoolExecutor(len(jobs)) as pool:
            for job in jobs:
                needed = [futures[name] for name in job.needs if name in futures]
                futures[job.name] = pool.submit(self._after, job, needed)

    def _after(self, job: Job, needed: list[Future[bool]]) -> bool:
        if not all(future.result() for future in needed):
            return False
        with self.places:
            return self._run(job)

    def _run(self, job: Job) -> bool:
        """Run a job, and return whether it is done."""
        if (self.folder / job.folder / job.writes).exists():
            return True
        left = self.deadline - time.monotonic()
        if left <= 1:
            self._note(job, 0.0, "no time left")
            return False
        begun = time.monotonic()
        environment = os.environ | {
            name: str(min(job.threads, max(1, CORES // 4)))
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        }
        command = ["nice", "-n", str(job.nice), sys.executable, "-m", "lgp", *job.command]
        with (self.folder / "logs" / f"{job.name}.log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=self.folder / job.folder, stdout=log, stderr=subprocess.STDOUT, env=environment
            )  # fmt: skip
            try:
                code: int | str = process.wait(left)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # a training saves its state
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                code = "stopped at the limit"
        self._note(job, time.monotonic() - begun, code)
        return code == 0

    def _note(self, job: Job, seconds: float, code: int | str) -> None:
        at = time.monotonic() - self.started
        with self._lock:
            self.times[job.name] = {"seconds": round(seconds, 1), "ended_at": round(at, 1), "exit": code}
            (self.folder / "times.json").write_text(json.dumps(self.times, indent=2) + "\n")
        print(f"{at:6.1f} s  {job.name}: {seconds:.1f} s, exit {code}", flush=True)


def speeds(file: Path | None, params: Params) -> tuple[dict[str, float], bool]:
    """Return images per second of `mim` and `cl`, and whether to compile.

    They are from a file of `gpu_speed.py`, or measured without compilation.
    """
    found: dict[bool, dict[str, float]] = {False: {}, True: {}}
    if file is not None and file.exists():
        for row in json.loads(file.read_text())["steps"]:
            if row["size"].startswith("32×32"):
                found[row["compiled"]][row["arm"]] = row["images_per_s_last"]
    if len(found[True]) == 2 and found[True]["cl"] > COMPILED_GAIN * found[False].get("cl", 0):
        return found[True], True
    if len(found[False]) == 2:
        return found[False], False
    return {arm: images_per_second(params, arm, 2.0) for arm in ("mim", "cl")}, False


def epochs_for(params: Params, of_arm: dict[str, float], images: int, seconds: float) -> dict[str, int]:
    """Return epochs of mim, cl and graft that take `seconds` together, in the preset's proportion.

    One GPU does the work of both processes, as fast as that of one. CL has the compute of MIM and graft, or a little
    more.
    """
    s_mim, s_cl = (images / of_arm[arm] for arm in ("mim", "cl"))
    whole = params.mim.epochs * s_mim + (params.cl.epochs + params.graft.epochs) * s_cl
    share = max(seconds, 1.0) / whole
    mim, graft = (max(2, round(share * section.epochs)) for section in (params.mim, params.graft))
    cost = {arm: stage_cost(arm, params).flops_per_image for arm in ("mim", "cl", "graft")}
    return {"mim": mim, "cl": math.ceil((mim * cost["mim"] + graft * cost["graft"]) / cost["cl"]), "graft": graft}


def write_params(args: argparse.Namespace) -> Params:
    """Write FOLDER/params.yaml: the preset `cifar10`, with fewer epochs and quicker evaluations."""
    done = args.folder / "params.yaml"
    if done.exists():
        return load_params(done)
    arms = [arm for arm in ARMS if arm not in args.without]
    file = args.folder / "params-new.yaml"
    file.write_text((PRESETS / "cifar10.yaml").read_text())
    values: dict[str, Any] = {
        "arms": arms,
        "finetuned_arms": [arm for arm in arms if arm != "pixels"],
        "selected": [SELECTED],
        "finetuned": [],
        "data.source": str(args.source.resolve()),
        "data.max_train_images": args.images,
        "data.max_test_images": args.images,
        "model.width": args.width,
        "model.depth": args.depth,
        # val chooses C: five folds of cross-validation would take five times as long
        "fewshot.choose": "validation",
        "fewshot.c_grid": [1e-3, 1e-2, 1e-1, 1.0],
        "propagation.k": [10],
        "propagation.alpha": [0.95],
        "run.workers": min(6, CORES // 2),
        "run.print_every_s": 5.0,
        # the time is for trainings
        "run.online_knn": {"every_epochs": 0},
        "run.accept": ["mim", "cl", "graft"],
    }
    params = write_values(file, values)
    if args.epochs:
        epochs, compiled = dict(zip(("mim", "cl", "graft"), args.epochs, strict=True)), args.compile
    else:
        of_arm, compiled = speeds(args.speeds, params)
        images = args.images or 49_000
        epochs = epochs_for(params, of_arm, images, args.train_seconds - STARTS_S)
        print(f"images per second {of_arm}, compiled {compiled}: epochs {epochs}", flush=True)
    values = {"run.compile": compiled}
    for arm, count in epochs.items():
        values |= {f"{arm}.epochs": count, f"{arm}.warmup_epochs": min(max(1, count // 10), count - 1)}
    if args.finetune_epochs:
        recipe = params.finetune["10pct"].model_dump(mode="json", exclude_unset=True)
        values["finetuned"] = ["all"]
        values["finetune.all"] = recipe | {"epochs": args.finetune_epochs, "warmup_epochs": 1, "batch_size": 512}
    params = write_values(file, values)
    put_in_place(file)
    return params


def put_in_place(file: Path) -> None:
    """Make a finished parameter file the project's, beside one that compiles nothing.

    Fine-tuning takes the latter: each of the twelve rates of stochastic depth would be compiled for itself.
    """
    eager = file.with_name(EAGER)
    eager.write_text(file.read_text())
    write_values(eager, {"run.compile": False})
    file.replace(file.with_name("params.yaml"))


def write_beside(folder: Path, params: Params, objective: str) -> None:
    """Write FOLDER/OBJECTIVE: a graft by another objective on the same MIM, with the same compute."""
    place = folder / objective
    if (place / "params.yaml").exists():
        return
    (place / "models").mkdir(parents=True, exist_ok=True)
    for link, target in (("data", "../data"), ("models/mim", "../../models/mim")):
        if not (place / link).is_symlink():
            (place / link).symlink_to(target)
    assert params.graft.stage_lr is not None
    rates = params.graft.stage_lr.base_lrs
    changes: dict[str, Any] = {
        "arms": ["graft"],
        "finetuned_arms": ["graft"],
        "contrastive.objective": objective,
        "graft.stage_lr": {"base_lrs": [max(rates)] * len(rates)},
    }
    file = place / "params-new.yaml"
    file.write_text((folder / "params.yaml").read_text())
    first, own = (stage_cost("graft", of).flops_per_image for of in (params, write_values(file, changes)))
    write_values(file, {"graft.epochs": round(params.graft.epochs * first / own)})
    put_in_place(file)


def jobs(params: Params, beside: list[str]) -> list[Job]:
    """List the jobs. Those beside the trainings give way to them."""
    arms, finetuned = params.arms, bool(params.finetuned)
    found = [
        Job("prepare", ("prepare",), Path("data/prepared"), (), 8),
        Job("labels", ("labels",), Path("data/labels"), ("prepare",), 4),
        Job("cl", ("cl",), Path("models/cl/metrics.json"), ("labels",)),
        Job("mim", ("mim",), Path("models/mim/metrics.json"), ("labels",)),
        Job("graft", ("graft",), Path("models/graft/metrics.json"), ("mim",)),
    ]
    if "pixels" in arms:
        found.append(Job("pixels", ("baseline", "pixels"), Path("models/pixels/metrics.json"), ("labels",)))
    for objective in beside:
        place = Path(objective)
        found.append(Job(objective, ("graft",), Path("models/graft/metrics.json"), ("mim",), folder=place))
    projects = [(arm, arm, Path()) for arm in arms] + [(objective, "graft", Path(objective)) for objective in beside]
    for label, arm, folder in projects:
        nice, threads = (10, 3) if arm == "pixels" else (10, 2) if arm == "mim" else (0, 2)
        tasks = [("linear",), *(("fewshot", few) for few in FEW), *(("propagate", few) for few in FEW)]
        if finetuned and arm != "pixels":
            tasks.append(("finetune", "all", "--params", EAGER))
        tasks.append(("selected", SELECTED))
        for task in tasks:
            name = "-".join(task[:2])
            # the first evaluation extracts the features, which the others wait for
            needs = (label,) if task == ("linear",) else (label, f"{label}-linear")
            command, writes = (task[0], arm, *task[1:]), Path(f"metrics/{arm}-{name}.json")
            gives_way = 10 if task[0] == "selected" else nice  # it takes longest
            found.append(Job(f"{label}-{name}", command, writes, needs, threads, gives_way, folder))
    return found


def report(folder: Path, params: Params, runner: Runner) -> None:
    """Write the report of the tasks that every arm has."""
    arms = [arm for arm in params.arms if (folder / f"metrics/{arm}-linear.json").exists()]

    def complete(task: str, names: list[str], of: list[str]) -> list[str]:
        return [n for n in names if all((folder / f"metrics/{arm}-{task}-{n}.json").exists() for arm in of)]

    few = complete("fewshot", list(FEW), arms)
    if not arms or not few:
        print("no report: no evaluation with few labels is done for every arm", flush=True)
        return
    tuned = [arm for arm in arms if arm != "pixels"]
    file = folder / "params-report.yaml"
    file.write_text((folder / "params.yaml").read_text())
    values = {
        "arms": arms,
        "few_labels": few,
        "propagated": complete("propagate", list(FEW), arms),
        "selected": complete("selected", [SELECTED], arms),
        "finetuned": complete("finetune", list(params.finetuned), tuned),
        "finetuned_arms": tuned,
    }
    write_values(file, values)
    runner.run([Job("report", ("report", "--params", file.name), Path("reports/report.md"), ())])


def pack(folder: Path, file: Path) -> None:
    """Pack what is small and worth keeping."""
    with tarfile.open(file, "w:xz") as tar:
        for pattern in (*PACKED, *(f"*/{pattern}" for pattern in PACKED)):
            # the MIM of a graft beside is a link
            for path in (p for p in sorted(folder.glob(pattern)) if not p.parent.is_symlink()):
                tar.add(path, path.relative_to(folder))
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB", flush=True)


def main() -> None:
    """Run everything until the limit, and pack the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packed", type=Path, default=Path("cifar10.tar.xz"))
    parser.add_argument("--limit", type=float, default=510, help="seconds until what is not done is stopped")
    parser.add_argument("--train-seconds", type=float, default=270, help="of the trainings, with their compilation")
    parser.add_argument("--speeds", type=Path, help="of gpu_speed.py; measured anew without it")
    parser.add_argument("--epochs", type=int, nargs=3, help="of mim, cl, graft; from the speeds without it")
    parser.add_argument("--compile", action="store_true", help="with --epochs: compile the blocks")
    parser.add_argument("--finetune-epochs", type=int, default=0, help="of fine-tuning with all labels; 0: none")
    parser.add_argument("--without", nargs="*", default=[], choices=ARMS, help="arms that are not evaluated")
    parser.add_argument("--beside", nargs="*", default=[], help="objectives of further grafts")
    parser.add_argument("--images", type=int, help="train and test images; all without it")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=12)
    args = parser.parse_args()
    runner = Runner(args.folder, time.monotonic() + args.limit)
    (args.folder / "logs").mkdir(parents=True, exist_ok=True)
    params = write_params(args)
    for objective in args.beside:
        write_beside(args.folder, params, objective)
    runner.run(jobs(params, args.beside))
    pack(args.folder, args.packed)  # at once: the report may take too long
    runner.deadline = time.monotonic() + 25
    report(args.folder, params, runner)
    pack(args.folder, args.packed)


if __name__ == "__main__":
    main()
