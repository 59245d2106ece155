"""When does it pay to hold the lower blocks back? The MAE's length, the depth and the rates of a graft, on digits.

    python benchmarks/mae_length.py FOLDER [--objectives mocov3 vicreg] [--seeds 12 …] [--depths 6 12]
        [--epochs 60 120 480 1920] [--ratios 1 0.3 0.1 0.03 0] [--rates …] [--jobs 2]

A graft is trained for every ratio on the MAE of every length. The ratio is that of the rate of the lower two thirds of
the blocks to the rate of the others; at 0 they are frozen. The paper's is 0.1. Grafts have the epochs of `seeds.py`, so
those of one objective and depth have the same compute, but for frozen blocks. The MAEs have not: that is the question.

The base rates are those that validation chose on other seeds for a MAE of 120 epochs and depth 6
(`digits-tuning.csv`). With MoCo v3 at 1.6e-2 one rate and the paper's rule are each within 0.1 points of their best.

Results that FOLDER already has are not computed again. The rows go into `mae-length.csv` beside this file: one per MAE
(without a ratio) and graft, top-1 in %.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Sequence
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
KEYS = ["seed", "depth", "epochs", "objective", "rate", "ratio"]
KEPT_SHARE = 2 / 3  # of the blocks, as in the paper


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
                "freeze": {"lower_blocks": round(KEPT_SHARE * start.depth)},
            }
        return start.changes() | {"graft": keys, "contrastive": contrastive}


def rows_of(root: Path, start: Start, grafts: Sequence[Graft]) -> list[dict[str, Any]]:
    """Train a MAE and the grafts on it where that is not done yet, evaluate them, and return a row for each."""
    data = {"data": root / f"seed{start.seed}"}
    mim = seeds.project(root / start.name, start.seed, start.changes(), data)
    rows = [_row(mim, "mim", start)]
    for graft in grafts:
        shared = data | {"models/mim": mim}
        folder = seeds.project(graft.folder(root, start), start.seed, graft.changes(start), shared)
        rows.append(_row(folder, "graft", start) | vars(graft))
    return rows


def _row(folder: Path, arm: str, start: Start) -> dict[str, Any]:
    tasks = {label: seeds.MEASURES[label] for label in MEASURES}
    metrics = seeds.metrics_of(folder, arm, tuple({task: None for task, _ in tasks.values()}))
    on_test = {label: metrics[task][key] for label, (task, key) in tasks.items()}
    on_val = {f"{label}, val": metrics[seeds.MEASURES[label][0]]["val/top1"] for label in ("1 %", "10 %")}
    return vars(start) | on_test | on_val


def all_rows(root: Path, starts: Sequence[Start], grafts: Sequence[Graft], jobs: int) -> pd.DataFrame:
    """Return the rows of all MAEs and grafts; the longest MAE is begun first."""
    for seed in {start.seed for start in starts}:
        seeds.project(root / f"seed{seed}", seed, {"run": {"precision": "auto"}}, {})
    ordered = sorted(starts, key=lambda start: -start.epochs * start.depth)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        found = [pool.submit(rows_of, root, start, grafts) for start in ordered]
        rows = pd.DataFrame([row for of_start in found for row in of_start.result()])
    return rows


def merged(before: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of both, in order. A newer row takes the place of the same MAE or graft."""
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
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one CPU core each")
    given = parser.parse_args()
    root, version = given.folder.resolve(), seeds.version_of_code()
    seeds.check_code(root, version)
    seeds.load_libraries()
    starts = [Start(*of) for of in itertools.product(given.seeds, given.depths, given.epochs)]
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
