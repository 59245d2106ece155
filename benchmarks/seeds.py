"""Several pre-training seeds of the arms that the paper compares, on digits: a table with intervals.

    python benchmarks/seeds.py FOLDER [--seeds 5]

Each seed draws splits, subsets, first weights and batches anew. Results that FOLDER already has are not computed again,
so the command may be stopped and called again. A seed takes about 15 minutes on one CPU core. The command writes
digits-seeds.csv and digits-seeds.md beside this file.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lgp.evaluate.statistics import mean_std_ci95

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "digits-seeds.csv"
# the paper's rule: the lower two thirds at a tenth of the peak
RULE = {"graft": {"stage_lr": {"base_lrs": [8e-4, 8e-4, 8e-3]}}}
VARIANTS = {
    "mim": "MAE",
    "cl": "MoCo v3, equal compute",
    "graft": "graft, lower two thirds at 0.1 of the rate",
    "graft_one_rate": "graft, one rate (the preset)",
    "joint": "both losses summed",
}
TASKS = {
    "linear": ["linear"],
    "fewshot-1pct": ["fewshot", "1pct"],
    "fewshot-10pct": ["fewshot", "10pct"],
    "finetune-10pct": ["finetune", "10pct"],
}
MEASURES = {
    "k-NN": ("linear", "test/knn_top1"),
    "linear": ("linear", "test/top1"),
    "1 %": ("fewshot-1pct", "test/top1"),
    "10 %": ("fewshot-10pct", "test/top1"),
    "fine-tuned, 10 %": ("finetune-10pct", "test/top1"),
}


def run(folder: Path, *command: str) -> None:
    """Run a stage in a project folder."""
    print(f"{folder.name}: {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, str(ROOT / "cli.py"), *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def project(folder: Path, seed: int, changes: dict[str, Any], shared: Path | None) -> Path:
    """Make a project folder of the preset `digits`. Where `shared` is given, images and MAE come from that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()) | {"seed": seed}
    for section, keys in changes.items():
        values[section] |= keys
    text = yaml.safe_dump(values)
    if (folder / "params.yaml").exists() and (folder / "params.yaml").read_text() != text:
        raise SystemExit(f"{folder} holds results of other parameters: remove it, or give another folder")
    (folder / "params.yaml").write_text(text)
    if shared is not None:
        for name in ("data", "models/mim"):
            (folder / name).parent.mkdir(exist_ok=True)
            if not (folder / name).exists():
                (folder / name).symlink_to(shared / name)
    else:
        for stage, result in (("prepare", "prepared"), ("labels", "labels")):
            if not (folder / "data" / result).exists():
                run(folder, stage)
    return folder


def results_of(folder: Path, arm: str) -> dict[str, float]:
    """Train and evaluate an arm where that is not done yet, and return its accuracies."""
    if not (folder / "models" / arm).exists():
        run(folder, arm)
    for task, command in TASKS.items():
        if not (folder / "metrics" / f"{arm}-{task}.json").exists():
            run(folder, command[0], arm, *command[1:])
    metrics = {task: json.loads((folder / "metrics" / f"{arm}-{task}.json").read_text()) for task in TASKS}
    return {name: metrics[task][key] for name, (task, key) in MEASURES.items()}


def of_seed(root: Path, seed: int) -> list[dict[str, Any]]:
    """Return a row per variant."""
    whole = project(root / f"seed{seed}", seed, {}, None)
    found = {arm: results_of(whole, arm) for arm in ("mim", "cl", "graft", "joint")}
    rule = project(root / f"seed{seed}-rule", seed, RULE, whole)
    found["graft_one_rate"], found["graft"] = found["graft"], results_of(rule, "graft")
    return [{"variant": variant, "seed": seed, **found[variant]} for variant in VARIANTS]


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def page(rows: pd.DataFrame) -> str:
    """Write two tables: accuracies, and the differences between variants, paired by seed."""
    seeds = rows["seed"].nunique()
    lines = [
        f"# Digits, {seeds} pre-training seeds",
        "",
        "Top-1 on test, %: mean ± half the 95 % interval over the seeds (Student's t), each a mean over five subsets.",
        "",
    ]

    def cell(values: pd.Series, sign: str = "") -> str:
        mean, _, ci95 = mean_std_ci95(values.tolist())
        text = f"{mean:{sign}.1f} ± {ci95:.1f}"
        return f"**{text}**" if sign and abs(mean) > ci95 else text

    by = {variant: of.set_index("seed") for variant, of in rows.groupby("variant")}
    of_variant = [[f"`{v}`", what, *(cell(by[v][m]) for m in MEASURES)] for v, what in VARIANTS.items()]
    lines += table(["arm", "what", *MEASURES], of_variant)
    lines += ["", "Ahead, paired by seed, in points; bold where the interval excludes a tie:", ""]
    pairs = itertools.combinations(reversed(VARIANTS), 2)
    compared = [[f"`{a}` over `{b}`", *(cell(by[a][m] - by[b][m], "+") for m in MEASURES)] for a, b in pairs]
    return "\n".join([*lines, *table(["", *MEASURES], compared), ""])


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds: two or more, for an interval")
    rows = pd.DataFrame([row for seed in range(given.seeds) for row in of_seed(given.folder.resolve(), seed)])
    rows.to_csv(OUT, index=False)
    OUT.with_suffix(".md").write_text(page(rows))
    print(OUT.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
