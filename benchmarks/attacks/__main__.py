"""Attack the tool, and count what holds: `python benchmarks/attacks`, or `make attack`.

Each kind of attack has a module here. A case is held if the tool gives a correct result, or one clear line and the
exit code 1 or 2. A case that fails is printed with its seed: `--only KIND --seed N --rounds 1` does it again. A kill
falls at a moment of the clock, so its seed alone does not bring it back.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

# before torch and MLflow are imported: no threads that a fork would lose
os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "MPLBACKEND": "agg"}
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import checkpoints
import damages
import disks
import folders
import kills
import manifests
import parameters
import pictures
from forks import import_all, remember
from project import Template
from tried import Tried

# name → how many rounds by default, and one round
IN_MEMORY: dict[str, tuple[int, Callable[[random.Random, Path], Tried]]] = {
    "parameters": (2000, parameters.attack),
    "manifests": (500, manifests.attack),
    "pictures": (500, pictures.attack),
    "folders": (200, folders.attack),
    "checkpoints": (1000, checkpoints.attack),
}
ON_STAGES: dict[str, tuple[int, Callable[[random.Random, Path, Template], list[Tried]]]] = {
    "damages": (200, damages.attack),
    "disks": (100, disks.attack),
    "kills": (250, kills.attack),
}
KINDS = {kind: rounds for kind, (rounds, _) in {**IN_MEMORY, **ON_STAGES}.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds to try, default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the next has the next seed")
    parser.add_argument("--rounds", type=int, help=f"of each kind, default: {KINDS}")
    parser.add_argument("--minutes", type=float, default=1e9, help="of each kind, at most")
    return parser.parse_args()


def _rounds(kind: str, seed: int, rounds: int, minutes: float, base: Path, made: list[Template]) -> Iterator[Tried]:
    """Try the rounds of a kind one after another. The first that needs the small project makes it, into `made`."""
    if kind in ON_STAGES and not made:
        made.append(Template(base / "template"))
    until = time.monotonic() + 60 * minutes
    for number in range(seed, seed + rounds):
        if time.monotonic() > until:
            break
        folder = base / "round"
        folder.mkdir()
        rng = random.Random(f"{kind} {number}")
        results = ON_STAGES[kind][1](rng, folder, made[0]) if kind in ON_STAGES else [IN_MEMORY[kind][1](rng, folder)]
        for result in results:
            if result.fault is not None:
                print(f"FAILED {kind}, {result.case}: {result.fault} (--only {kind} --seed {number} --rounds 1)")
                print("".join(f"    {line}\n" for line in result.detail.splitlines()[-12:]), end="", flush=True)
            yield result
        shutil.rmtree(folder, ignore_errors=True)


def _table(tried: Counter[tuple[str, str]], held: Counter[tuple[str, str]], told: Counter[tuple[str, str]]) -> str:
    """Return the table, a row per kind and case. An attack that is always told of attacks nothing behind the line."""
    lines = ["| kind | case | tried | held | by one line |", "|---|---|---|---|---|"]
    for row in sorted(tried, key=lambda of: (list(KINDS).index(of[0]), of[1])):
        lines.append(f"| {row[0]} | {row[1]} | {tried[row]:,} | {held[row]:,} | {told[row]:,} |")
    return "\n".join([*lines, f"| all | | {tried.total():,} | {held.total():,} | {told.total():,} |"])


def main() -> None:
    """Try all kinds, and print the table."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the table so far
    import_all(["cli", "torch", "torchvision", "mlflow", "pandas", "pyarrow.parquet", "timm", "PIL.Image"])
    remember()
    tried: Counter[tuple[str, str]] = Counter()
    held: Counter[tuple[str, str]] = Counter()
    told: Counter[tuple[str, str]] = Counter()
    base, made = Path(tempfile.mkdtemp(prefix="lgp-attack-")), list[Template]()
    try:
        for kind in arguments.only or KINDS:
            started = time.monotonic()
            for result in _rounds(kind, arguments.seed, arguments.rounds or KINDS[kind], arguments.minutes, base, made):
                tried[kind, result.case] += 1
                held[kind, result.case] += result.fault is None
                told[kind, result.case] += result.told
            of_kind = sum(count for (name, _), count in tried.items() if name == kind)
            print(f"{kind}: {of_kind} tried in {time.monotonic() - started:.0f} s", flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        print(_table(tried, held, told), flush=True)
    sys.exit(tried != held)


if __name__ == "__main__":
    main()
