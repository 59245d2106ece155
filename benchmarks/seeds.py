"""Several pre-training seeds of the arms that the paper compares, on digits: a table with intervals.

    python benchmarks/seeds.py FOLDER --tune [--jobs 2]        # chooses a rate for each arm: digits-tuning.csv
    python benchmarks/seeds.py FOLDER [--seeds N…] [--jobs 2]  # trains with these: digits-seeds.csv, digits-seeds.md

Each arm has the same number of trials: every rate of `RATES`, on the seeds `TUNED_ON`, which no table reports. The rate
with the best accuracy of frozen features on val is taken (mean over 1 % and 10 % of labels and the seeds). The rate of
fine-tuning is chosen on val within each run, from the list of the preset, which is the same for all arms.

Each seed draws splits, subsets, first weights and batches anew. Results that FOLDER already has are not computed again,
so the command may be stopped and called again. FOLDER keeps the digest of the code: results of another version are
refused. A seed takes about 20 minutes on one CPU core. Both commands write beside this file.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lgp.evaluate.statistics import students_interval
from lgp.workflow.code_digest import code_digests

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "digits-seeds.csv"
TUNING = ROOT / "benchmarks" / "digits-tuning.csv"
TUNED_ON = (0, 1)  # one seed of 143 validation images cannot tell rates apart that differ by a point
SEEDS = (5, 6, 7, 8, 9)
RATES = (4e-3, 8e-3, 1.6e-2)  # MIM loses 20 points at 3.2e-2, on each of three seeds
STAGES = (
    "prepare",
    "labels",
    "mim",
    "cl",
    "graft",
    "baseline",
    "linear",
    "fewshot",
    "propagate",
    "selected",
    "finetune",
)
PIXELS = "pixels"  # has no rate to tune, and nothing to fine-tune
VARIANTS = {
    PIXELS: "raw pixels",
    "mim": "MAE",
    "cl": "MoCo v3, equal compute",
    "graft": "graft, lower two thirds at 0.1 of the rate",
    "graft_one_rate": "graft, one rate (the preset)",
}
STEPS = (("mim", "cl"), ("graft", "graft_one_rate"))  # grafts start from mim
TASKS = {
    "linear": ["linear"],
    "fewshot-1pct": ["fewshot", "1pct"],
    "fewshot-10pct": ["fewshot", "10pct"],
    "propagate-1pct": ["propagate", "1pct"],
    "propagate-10pct": ["propagate", "10pct"],
    "selected-1pct": ["selected", "1pct"],
    "selected-10pct": ["selected", "10pct"],
    "selected-1pct-propagated": ["selected", "1pct"],
    "selected-10pct-propagated": ["selected", "10pct"],
    "finetune-10pct": ["finetune", "10pct"],
}
TUNED = "finetune-10pct"
CHOSEN_BY = ("fewshot-1pct", "fewshot-10pct")
MEASURES = {
    "k-NN": ("linear", "test/knn_top1"),
    "linear": ("linear", "test/top1"),
    "1 %": ("fewshot-1pct", "test/top1"),
    "10 %": ("fewshot-10pct", "test/top1"),
    "1 %, propagated": ("propagate-1pct", "test/top1"),
    "10 %, propagated": ("propagate-10pct", "test/top1"),
    "1 %, selected": ("selected-1pct", "test/top1"),
    "10 %, selected": ("selected-10pct", "test/top1"),
    "1 %, both": ("selected-1pct-propagated", "test/top1"),
    "10 %, both": ("selected-10pct-propagated", "test/top1"),
    "fine-tuned, 10 %": ("finetune-10pct", "test/top1"),
}
METHODS = ("propagated", "selected", "both")


def arm_of(variant: str) -> str:
    """Return the arm that a variant trains."""
    return "graft" if variant.startswith("graft") else variant


def changes_of(variant: str, rate: float) -> dict[str, Any]:
    """Return the keys that a variant changes at a base learning rate. The paper's rule: 0.1 of it below."""
    if variant == PIXELS:
        return {}
    if arm_of(variant) != "graft":
        return {variant: {"base_lr": rate}}
    lower = rate / 10 if variant == "graft" else rate
    return {"graft": {"stage_lr": {"base_lrs": [lower, lower, rate]}}}


def version_of_code() -> str:
    """Return a digest of the code of all stages that a result comes from."""
    digests = code_digests(ROOT)
    return sha256(json.dumps([digests[stage] for stage in STAGES]).encode()).hexdigest()[:16]


def check_code(root: Path, version: str) -> None:
    """Refuse a folder with results of other code, or with anything that says no version."""
    file = root / "code.txt"
    if root.is_dir() and any(root.iterdir()) and (not file.exists() or file.read_text() != version):
        raise SystemExit(f"{root} holds results of another version of the code: remove it, or give another folder")
    root.mkdir(parents=True, exist_ok=True)
    file.write_text(version)


def tuned_rates(version: str) -> dict[str, float]:
    """Return the chosen rate of each variant. Refuse rates that other code chose."""
    if not TUNING.exists():
        raise SystemExit(f"no {TUNING}: run with --tune first")
    tuning = pd.read_csv(TUNING)
    if set(tuning["code"]) != {version}:
        raise SystemExit(f"{TUNING} is of another version of the code: run with --tune again")
    return dict(tuning.loc[tuning["chosen"], ["variant", "rate"]].itertuples(index=False))


def run(folder: Path, *command: str) -> None:
    """Run a stage in a project folder. All projects share one store of runs."""
    print(f"{folder.name}: {' '.join(command)}", flush=True)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder.parent}/mlflow.db"}
    line = [sys.executable, str(ROOT / "cli.py"), *command]
    subprocess.run(line, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def project(folder: Path, seed: int, changes: dict[str, Any], shared: dict[str, Path | None]) -> Path:
    """Make a project folder of the preset `digits`. `shared` says which of its folders come from another project."""
    folder.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load((ROOT / "presets" / "digits.yaml").read_text()) | {"seed": seed}
    values["run"] |= {"precision": "fp32"}  # on every device
    for section, keys in changes.items():
        values[section] |= keys
    text = yaml.safe_dump(values)
    if (folder / "params.yaml").exists() and (folder / "params.yaml").read_text() != text:
        raise SystemExit(f"{folder} holds results of other parameters: remove it, or give another folder")
    (folder / "params.yaml").write_text(text)
    for name, other in shared.items():
        if other is not None and not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(other / name)
    for stage, result in (("prepare", "prepared"), ("labels", "labels")):
        if not (folder / "data" / result).exists():
            run(folder, stage)
    return folder


def metrics_of(folder: Path, arm: str, tasks: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Train and evaluate an arm where that is not done yet, and return its metrics by task."""
    if not (folder / "models" / arm / "encoder").exists():
        run(folder, *(["baseline", PIXELS] if arm == PIXELS else [arm]))
    for task in tasks:
        if not (folder / "metrics" / f"{arm}-{task}.json").exists():
            run(folder, TASKS[task][0], arm, *TASKS[task][1:])
    return {task: json.loads((folder / "metrics" / f"{arm}-{task}.json").read_text()) for task in tasks}


def tune(root: Path, jobs: int) -> pd.DataFrame:
    """Return a row per variant and rate, with its accuracy on val over the tuning seeds, and whether it was chosen."""
    rows: list[dict[str, Any]] = []
    best_mim = 0.0
    for seed in TUNED_ON:  # all trials of a seed take images and labels from its first
        project(trial_folder(root, seed, "mim", RATES[0]), seed, changes_of("mim", RATES[0]), {})
    for variants in STEPS:  # grafts start from the best MAE
        trials = list(itertools.product(variants, RATES, TUNED_ON))
        with ThreadPoolExecutor(jobs) as pool:
            found = list(pool.map(lambda trial: validated(root, trial, best_mim), trials))  # noqa: B023 - called before it changes
        on_val = np.reshape(found, (len(variants), len(RATES), len(TUNED_ON))).mean(axis=2).round(2)
        for variant, of_rates in zip(variants, on_val, strict=True):
            chosen = int(of_rates.argmax())
            best_mim = RATES[chosen] if variant == "mim" else best_mim
            rows += [
                {"variant": variant, "rate": rate, "val": top1, "chosen": number == chosen}
                for number, (rate, top1) in enumerate(zip(RATES, of_rates, strict=True))
            ]
    return pd.DataFrame(rows)


def trial_folder(root: Path, seed: int, variant: str, rate: float) -> Path:
    """Return the project folder of a trial."""
    return root / f"tune{seed}-{variant}-{rate:g}"


def validated(root: Path, trial: tuple[str, float, int], best_mim: float) -> float:
    """Return the accuracy on val of a trial (variant, rate, seed), 0 where it did not train.

    A graft starts from the MAE of `best_mim`.
    """
    variant, rate, seed = trial
    first, mim = (trial_folder(root, seed, "mim", of_mim) for of_mim in (RATES[0], best_mim))
    folder = trial_folder(root, seed, variant, rate)
    shared = {"data": first if folder != first else None, "models/mim": mim if arm_of(variant) == "graft" else None}
    project(folder, seed, changes_of(variant, rate), shared)
    try:
        found = metrics_of(folder, arm_of(variant), CHOSEN_BY)
    except subprocess.CalledProcessError:
        print(f"{folder.name}: did not train, the rate is lost", flush=True)
        return 0.0
    return sum(found[task]["val/top1"] for task in CHOSEN_BY) / len(CHOSEN_BY)


def seeds_of(root: Path, seeds: Sequence[int], rates: dict[str, float], jobs: int) -> list[dict[str, Any]]:
    """Return a row per variant and seed."""
    for seed in seeds:
        project(root / f"seed{seed}-{PIXELS}", seed, {}, {})
    rows = []
    for variants in ((PIXELS, *STEPS[0]), STEPS[1]):
        with ThreadPoolExecutor(jobs) as pool:
            pairs = itertools.product(variants, seeds)
            rows += list(pool.map(lambda pair: of_seed(root, pair[0], pair[1], rates.get(pair[0], 0.0)), pairs))
    return rows


def of_seed(root: Path, variant: str, seed: int, rate: float) -> dict[str, Any]:
    """Train and evaluate a variant, and return its row. A graft starts from the MAE of the seed."""
    first, mim = (root / f"seed{seed}-{name}" for name in (PIXELS, "mim"))
    folder = root / f"seed{seed}-{variant}"
    shared = {"data": first if folder != first else None, "models/mim": mim if arm_of(variant) == "graft" else None}
    project(folder, seed, changes_of(variant, rate), shared)
    metrics = metrics_of(folder, arm_of(variant), tuple(t for t in TASKS if variant != PIXELS or t != TUNED))
    of_task = {name: metrics[task][key] for name, (task, key) in MEASURES.items() if task in metrics}
    return {"variant": variant, "seed": seed, **of_task, "tuned_lr": metrics.get(TUNED, {}).get("base_lr")}


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
        if values.isna().any():
            return "–"
        low, high = students_interval(values.tolist())
        mean, half = (low + high) / 2, (high - low) / 2
        text = f"{mean:{sign}.1f} ± {half:.1f}"
        return f"**{text}**" if sign and abs(mean) > half else text

    by = {variant: of.set_index("seed") for variant, of in rows.groupby("variant")}
    of_variant = [[f"`{v}`", what, *(cell(by[v][m]) for m in MEASURES)] for v, what in VARIANTS.items()]
    lines += table(["arm", "what", *MEASURES], of_variant)
    lines += ["", "Ahead, paired by seed, in points; bold where the interval excludes a tie:", ""]
    pairs = itertools.combinations(reversed(VARIANTS), 2)
    compared = [[f"`{a}` over `{b}`", *(cell(by[a][m] - by[b][m], "+") for m in MEASURES)] for a, b in pairs]
    lines += table(["", *MEASURES], compared)
    lines += ["", "What a method adds to logistic regression on random images, paired by seed, in points:", ""]
    added = [
        [f"`{v}`, {share}", *(cell(by[v][f"{share}, {how}"] - by[v][share], "+") for how in METHODS)]
        for v in VARIANTS
        for share in ("1 %", "10 %")
    ]
    return "\n".join([*lines, *table(["arm, labels", *METHODS], added), ""])


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tune", action="store_true", help="choose the rates, on the seeds of the tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="two or more, for an interval")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one CPU core each")
    given = parser.parse_args()
    root = given.folder.resolve()
    version = version_of_code()
    check_code(root, version)
    if given.tune:
        tuning = tune(root, given.jobs).assign(code=version)
        tuning.to_csv(TUNING, index=False)
        print(tuning.to_string(index=False))
        return
    if set(TUNED_ON) & set(given.seeds):
        parser.error(f"seeds {', '.join(map(str, TUNED_ON))} chose the rates: give others")
    if len(given.seeds) < 2:
        parser.error("--seeds: two or more, for an interval")
    rates = tuned_rates(version)
    rows = pd.DataFrame(seeds_of(root, given.seeds, rates, given.jobs)).assign(code=version)
    rows.to_csv(OUT, index=False)
    OUT.with_suffix(".md").write_text(page(rows))
    print(OUT.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
