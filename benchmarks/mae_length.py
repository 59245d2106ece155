"""When does it pay to hold the lower blocks back? The MAE's length, the depth and the rates of a graft, on digits.

    python benchmarks/mae_length.py FOLDER [--objectives mocov3 vicreg] [--seeds 12 …] [--depths 6 12]
        [--epochs 60 120 480 1920] [--ratios 1 0.3 0.1 0.03 0] [--rates …] [--jobs 2]

A graft is trained for every ratio on the MAE of every length. The ratio is that of the rate of the lower two thirds of
the blocks to the rate of the others; at 0 they are frozen. The paper's is 0.1. Grafts of one objective and depth have
the same compute, the epochs of `seeds.py`; those with frozen blocks have less. The MAEs differ in compute.

The default rates come from `digits-tuning.csv`, which has a MAE of 120 epochs, depth 6 and fp32. With MoCo v3
validation chose 1.6e-2 for the ratio 0.1, and 8e-3 for the ratio 1, 0.07 points ahead of 1.6e-2. No other ratio, length
or depth was tuned. Trainings have the precision that `run.precision: auto` takes.

Results that FOLDER already has are not computed again. The rows go into `mae-length.csv` beside this file: one per MAE
(without a ratio) and graft, top-1 in %. A newer row replaces the older row of the same MAE or graft. On one CPU core a
MAE of 1,920 epochs takes 13 minutes with 6 blocks and 20 with 12, a graft 2 and 3.
"""

import argparse
import itertools
import multiprocessing
import subprocess
from collections.abc import Sequence, Set
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import seeds

OUT = seeds.ROOT / "benchmarks" / "mae-length.csv"
MIM_RATE = 8e-3
RATES = {"mocov3": 1.6e-2, "vicreg": 4e-3}
MEASURES = ("k-NN", "linear", "1 %", "10 %", "1 %, propagated", "1 %, both")
ON_VAL = ("1 %, val", "10 %, val")
TASKS = tuple(dict.fromkeys(seeds.MEASURES[label][0] for label in MEASURES))
KEYS = ["seed", "depth", "epochs", "objective", "rate", "ratio"]


@dataclass(frozen=True)
class Start:
    """A MAE to graft on.

    Attributes:
        seed: of everything that is drawn.
        depth: blocks.
        epochs: of the MAE.
    """

    seed: int
    depth: int
    epochs: int

    @property
    def name(self) -> str:
        """Return the name of its project folder."""
        return f"seed{self.seed}-d{self.depth}-mim{self.epochs}"

    def changes(self) -> dict[str, dict[str, Any]]:
        """Return the keys of the preset that differ, by section."""
        return {
            "model": {"depth": self.depth},
            "run": {"precision": "auto"},
            "mim": {"epochs": self.epochs, "base_lr": MIM_RATE},
        }


@dataclass(frozen=True)
class Graft:
    """How to graft on a MAE.

    Attributes:
        objective: of the graft.
        ratio: the rate of the lower two thirds over `rate`.
        rate: of the upper blocks and the heads, per 256 images.
    """

    objective: str
    ratio: float
    rate: float

    def folder(self, root: Path, start: Start) -> Path:
        """Return its project folder."""
        return root / f"{start.name}-{self.objective}-q{self.ratio:g}-{self.rate:g}"

    def changes(self, start: Start) -> dict[str, dict[str, Any]]:
        """Return the keys of the preset that differ, by section."""
        contrastive, (epochs, *_) = seeds.OBJECTIVES[self.objective]
        lower = self.ratio * self.rate
        keys: dict[str, Any] = {"epochs": epochs, "stage_lr": {"base_lrs": [lower, lower, self.rate]}}
        if not self.ratio:
            keys |= {
                "stage_lr": {"base_lrs": [self.rate]},
                "policy": ["stage_lr", "freeze"],
                "freeze": {"lower_blocks": 2 * start.depth // 3},
            }
        return start.changes() | {"graft": keys, "contrastive": contrastive}


def rows_of(root: Path, start: Start, grafts: Sequence[Graft]) -> list[dict[str, Any]]:
    """Train a MAE and the grafts on it where that is not done yet, evaluate them, and return a row for each.

    What does not train has no row.
    """
    data = {"data": root / f"seed{start.seed}"}
    mim = seeds.project(root / start.name, start.seed, start.changes(), data)
    rows = [_row(mim, "mim", vars(start))]
    for graft in grafts if rows[0] else []:
        shared = data | {"models/mim": mim}
        folder = seeds.project(graft.folder(root, start), start.seed, graft.changes(start), shared)
        rows.append(_row(folder, "graft", vars(start) | vars(graft)))
    return [row for row in rows if row]


def _row(folder: Path, arm: str, of: dict[str, Any]) -> dict[str, Any]:
    """Return what `of` says with the accuracies of an arm; nothing where it did not train."""
    try:
        metrics = seeds.metrics_of(folder, arm, TASKS)
    except subprocess.CalledProcessError:
        print(f"{folder.name}: failed, see {folder / 'log.txt'}", flush=True)
        return {}
    places = seeds.MEASURES | seeds.ON_VAL
    return of | {label: metrics[places[label][0]][places[label][1]] for label in (*MEASURES, *ON_VAL)}


def all_rows(root: Path, starts: Set[Start], grafts: Sequence[Graft], jobs: int) -> pd.DataFrame:
    """Return the rows of all MAEs and grafts; the longest MAE is begun first."""
    for seed in {start.seed for start in starts}:
        seeds.project(root / f"seed{seed}", seed, {"run": {"precision": "auto"}}, {})
    ordered = sorted(starts, key=lambda start: (-start.epochs * start.depth, start.seed))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        found = [pool.submit(rows_of, root, start, grafts) for start in ordered]
        return pd.DataFrame([row for of_start in found for row in of_start.result()])


def merged(before: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of both, in order. A newer row replaces the older row of the same MAE or graft."""
    both = pd.concat([before, rows], ignore_index=True).drop_duplicates(KEYS, keep="last")
    return both.sort_values(KEYS, na_position="first", ignore_index=True)


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objectives", nargs="+", choices=list(RATES), default=["mocov3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[12])
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 12], help="multiples of 3")
    parser.add_argument("--epochs", type=int, nargs="+", default=[60, 120, 480, 1920], help="of the MAE")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 0.3, 0.1, 0.03, 0], help="from 0 to 1")
    parser.add_argument("--rates", type=float, nargs="+", help="default: the one that validation chose")
    parser.add_argument("--jobs", type=int, default=1, help="MAEs at a time, each with its grafts, on one CPU core")
    given = parser.parse_args()
    if any(depth % 3 for depth in given.depths):
        parser.error(f"--depths: multiples of 3, for the lower two thirds, not {given.depths}")
    if not all(0 <= ratio <= 1 for ratio in given.ratios):
        parser.error(f"--ratios: from 0 to 1, not {given.ratios}")
    if set(seeds.TUNED_ON) & set(given.seeds):
        parser.error(f"seeds {', '.join(map(str, seeds.TUNED_ON))} chose the rates: give others")
    root, version = given.folder.resolve(), seeds.version_of_code()
    seeds.check_code(root, version)
    seeds.load_libraries()
    starts = {Start(*of) for of in itertools.product(given.seeds, given.depths, given.epochs)}
    grafts = [
        Graft(objective, ratio, rate)
        for objective, ratio in itertools.product(given.objectives, given.ratios)
        for rate in given.rates or [RATES[objective]]
    ]
    before = pd.read_csv(OUT) if OUT.exists() else pd.DataFrame(columns=KEYS)
    rows = merged(before, all_rows(root, starts, grafts, given.jobs).assign(code=version))
    rows.to_csv(OUT, index=False)
    print(rows.to_string(index=False))


if __name__ == "__main__":
    main()
