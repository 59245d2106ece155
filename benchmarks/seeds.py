"""Several pre-training seeds of the paper's arms and of other grafts, on digits: a table with intervals.

    python benchmarks/seeds.py FOLDER --tune [VARIANT …] [--jobs 2]  # chooses rates: digits-tuning.csv
    python benchmarks/seeds.py FOLDER [--seeds N…] [--variants …] [--jobs 2]  # trains with these: digits-seeds.csv, .md

Each tuned variant has the same number of trials: every rate of `RATES`, on the seeds `TUNED_ON`, which no table
reports. The rate with the best accuracy of frozen features on val is taken (mean over 1 % and 10 % of labels and the
seeds). Small views and a head warm-up take the rate of the same variant without them. The rate of fine-tuning is chosen
on val within each run, from the list of the preset, which is the same for all arms.

Grafts have the compute of the graft in the preset `digits-paper`, and contrastive arms that of its `cl`: their epochs
follow from the operations of a step (`tests/test_seeds.py`).

Each seed draws splits, subsets, first weights and batches anew. Results that FOLDER already has are not computed again,
so the command may be stopped and called again. FOLDER keeps the digest of the code: results of another version are
refused. A seed takes about an hour on one CPU core. Both commands write beside this file.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.stats import t

from lgp.evaluate.statistics import holm, students_interval
from lgp.workflow.code_digest import code_digests

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "digits-seeds.csv"
TUNING = ROOT / "benchmarks" / "digits-tuning.csv"
TUNED_ON = (0, 1)  # one seed of 143 validation images cannot tell rates apart that differ by a point
SEEDS = (12, 13, 14, 15, 16)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)  # MIM loses 20 points at 3.2e-2, on each of three seeds
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
    "semi",
)
PIXELS = "pixels"  # has no rate to tune, and nothing to fine-tune
SMALL_VIEWS = {"count": 4, "size": 4, "crop_scale_min": 0.15, "crop_scale_max": 0.4}
# keys of an objective, and the epochs of its graft: plain, with small views, and with a head warm-up
OBJECTIVES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "mocov3": ({}, (60, 41, 57)),
    "vicreg": ({"objective": "vicreg"}, (80, 50, 78)),
    "swav": ({"objective": "swav", "temperature": 0.1}, (81, 51, 79)),  # the published temperature
    "refine": ({"objective": "refine", "refine": {"queue": 512}}, (80, 50, 78)),  # a queue of 646 is half of the images
}


@dataclass(frozen=True)
class Variant:
    """A way to train an arm.

    Attributes:
        arm: that is trained.
        what: of it, in the table.
        epochs: of equal compute.
        contrastive: the keys that differ from the preset.
        lower: rate of the lower two thirds of the blocks, as a share of the rate of the others.
        warmup: epochs in which the heads are trained alone.
        rate_of: the variant whose chosen rate is taken; its own where it is None.
    """

    arm: str
    what: str
    epochs: int
    contrastive: Mapping[str, Any] = field(default_factory=dict)
    lower: float = 1.0
    warmup: int = 0
    rate_of: str | None = None


def grafts_of(objective: str, name: str, what: str, lower: float = 1.0) -> dict[str, Variant]:
    """Return the grafts with an objective: plain, with small views, and with a head warm-up."""
    keys, (plain, small, warm) = OBJECTIVES[objective]
    of_small = keys | {"small_views": SMALL_VIEWS}
    return {
        name: Variant("graft", what, plain, keys, lower),
        f"{name}_small": Variant("graft", f"{what}, small views", small, of_small, lower, rate_of=name),
        f"{name}_warm": Variant("graft", f"{what}, head warm-up", warm, keys, lower, warmup=5, rate_of=name),
    }


VARIANTS = {
    PIXELS: Variant(PIXELS, "raw pixels", 0),
    "mim": Variant("mim", "MAE", 120),
    "cl": Variant("cl", "MoCo v3 from scratch", 80),
    "cl_small": Variant("cl", "MoCo v3 from scratch, small views", 55, {"small_views": SMALL_VIEWS}, rate_of="cl"),
    "cl_vicreg": Variant("cl", "VICReg from scratch", 107, OBJECTIVES["vicreg"][0]),
    **grafts_of("mocov3", "graft", "graft, mocov3, the paper's rule: lower two thirds at 0.1 of the rate", lower=0.1),
    **{k: v for by in OBJECTIVES for k, v in grafts_of(by, f"graft_{by}", f"graft, {by}").items()},
}
TRAINED = [name for name in VARIANTS if name != PIXELS]
TUNED = [name for name in TRAINED if VARIANTS[name].rate_of is None]
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
    "semi-10pct": ["semi", "10pct"],
}
FINE_TUNED = ("finetune-10pct", "semi-10pct")
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
    "semi-supervised, 10 %": ("semi-10pct", "test/top1"),
}
METHODS = ("propagated", "selected", "both")
ON_VAL = {f"{label}, val": (task, "val/top1") for label, (task, _) in MEASURES.items() if task != "linear"}


def preset() -> dict[str, Any]:
    """Return the values of the preset `digits-paper`."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "presets" / "digits-paper.yaml").read_text())
    return values


def changes_of(name: str, rate: float) -> dict[str, dict[str, Any]]:
    """Return the keys that a variant changes at a base learning rate, by section."""
    variant = VARIANTS[name]
    if name == PIXELS:
        return {}
    keys: dict[str, Any] = {"epochs": variant.epochs}
    if variant.arm != "graft":
        keys["base_lr"] = rate
    else:
        lower = variant.lower * rate
        keys |= {"stage_lr": {"base_lrs": [lower, lower, rate]}, "head_warmup_epochs": variant.warmup}
    return {variant.arm: keys, "contrastive": dict(variant.contrastive)}


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


def tuned_rates(version: str, names: Sequence[str]) -> dict[str, float]:
    """Return the rate of `mim`, from which grafts start, and of some variants. Tell of rates that other code chose."""
    tuning = pd.read_csv(TUNING) if TUNING.exists() else pd.DataFrame(columns=["variant", "rate", "chosen", "code"])
    chosen = tuning[tuning["chosen"].astype(bool)].set_index("variant")
    needed = sorted({"mim"} | {VARIANTS[name].rate_of or name for name in names if name != PIXELS}, key=TUNED.index)
    if missing := [name for name in needed if name not in chosen.index]:
        raise SystemExit(f"no rates of {', '.join(missing)}: run with --tune {' '.join(missing)} first")
    if old := [name for name in needed if chosen["code"][name] != version]:
        print(f"the rates of {', '.join(old)} were chosen by another version of the code", flush=True)
    rates = {name: float(chosen["rate"][name]) for name in needed} | {PIXELS: 0.0}
    return {name: rates[VARIANTS[name].rate_of or name] for name in ("mim", *names)}


def run(folder: Path, *command: str) -> None:
    """Run a stage in a project folder. All projects share one store of runs.

    The stage is a fork of this process, which has the libraries loaded: a new Python takes four seconds to do so.
    """
    print(f"{folder.name}: {' '.join(command)}", flush=True)
    stage = multiprocessing.get_context("fork").Process(target=_stage, args=(folder, command))
    stage.start()
    stage.join()
    if stage.exitcode:
        raise subprocess.CalledProcessError(stage.exitcode, ["lgp", *command])


def _stage(folder: Path, command: Sequence[str]) -> None:
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder.parent}/mlflow.db"
    with Path("log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    from cli import app

    app(list(command))


def project(folder: Path, seed: int, changes: Mapping[str, Any], shared: Mapping[str, Path | None]) -> Path:
    """Make a project folder of the preset. `shared` says which of its folders come from another project."""
    folder.mkdir(parents=True, exist_ok=True)
    values = preset() | {"seed": seed}
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


@dataclass(frozen=True)
class Trial:
    """A variant at a rate, on a seed. A graft starts from the MAE of the rate `mim`."""

    name: str
    rate: float
    seed: int
    mim: float

    def folder(self, root: Path) -> Path:
        """Return the project folder."""
        return root / f"seed{self.seed}-{self.name}-{self.rate:g}"

    def start(self) -> "Trial":
        """Return the MAE that a graft starts from."""
        return Trial("mim", self.mim, self.seed, self.mim)


def results_of(root: Path, trial: Trial, tasks: tuple[str, ...]) -> dict[str, dict[str, float]] | None:
    """Train and evaluate a trial, and return its metrics by task; None where it did not train."""
    arm = VARIANTS[trial.name].arm
    mim = trial.start().folder(root) if arm == "graft" else None
    shared = {"data": root / f"seed{trial.seed}", "models/mim": mim}
    folder = project(trial.folder(root), trial.seed, changes_of(trial.name, trial.rate), shared)
    try:
        return metrics_of(folder, arm, tasks)
    except subprocess.CalledProcessError:
        print(f"{folder.name}: failed, see {folder / 'log.txt'}", flush=True)
        return None


def all_results(
    root: Path, trials: Sequence[tuple[Trial, tuple[str, ...]]], jobs: int
) -> list[dict[str, dict[str, float]] | None]:
    """Return the metrics of all trials, each with the tasks beside it. The MAEs of the grafts are trained first."""
    for seed in {trial.seed for trial, _ in trials}:
        project(root / f"seed{seed}", seed, {}, {})
    starts = list(dict.fromkeys(trial.start() for trial, _ in trials if VARIANTS[trial.name].arm == "graft"))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for done in [pool.submit(results_of, root, start, ()) for start in starts]:
            done.result()
        return [f.result() for f in [pool.submit(results_of, root, trial, tasks) for trial, tasks in trials]]


def tune(root: Path, names: Sequence[str], mim: float | None, jobs: int) -> pd.DataFrame:
    """Return a row per variant and rate, with its accuracy on val over the tuning seeds, and whether it was chosen.

    Args:
        root: folder of the results.
        names: the variants. The rate of `mim` is chosen first.
        mim: the rate of the MAE that grafts start from, where `mim` is not among the names.
        jobs: trainings at a time.
    """
    rows: list[dict[str, Any]] = []
    for step in (["mim"] if "mim" in names else [], [name for name in names if name != "mim"]):
        trials = [Trial(*of, mim or 0.0) for of in itertools.product(step, RATES, TUNED_ON)]
        found = [on_val(of) for of in all_results(root, [(trial, CHOSEN_BY) for trial in trials], jobs)]
        by_rate = np.reshape(found, (len(step), len(RATES), len(TUNED_ON))).mean(axis=2).round(2)
        for name, of_rates in zip(step, by_rate, strict=True):
            chosen = int(of_rates.argmax())
            mim = RATES[chosen] if name == "mim" else mim
            rows += [
                {"variant": name, "rate": rate, "val": top1, "chosen": number == chosen}
                for number, (rate, top1) in enumerate(zip(RATES, of_rates, strict=True))
            ]
    return pd.DataFrame(rows)


def on_val(metrics: dict[str, dict[str, float]] | None) -> float:
    """Return the accuracy on val of a trial, 0 where it did not train."""
    return 0.0 if metrics is None else sum(metrics[task]["val/top1"] for task in CHOSEN_BY) / len(CHOSEN_BY)


def seeds_of(
    root: Path,
    seeds: Sequence[int],
    names: Sequence[str],
    rates: dict[str, float],
    fine_tuned: Sequence[str],
    jobs: int,
) -> pd.DataFrame:
    """Return a row per variant and seed. What did not train has no row.

    Args:
        root: folder of the results.
        seeds: of pre-training.
        names: the variants.
        rates: variant → its rate; that of `mim` is of the MAE that grafts start from.
        fine_tuned: variants that are fine-tuned too, without and with unlabelled images.
        jobs: trainings at a time.
    """
    trials = [Trial(name, rates[name], seed, rates["mim"]) for seed in seeds for name in names]
    tasks = [tuple(t for t in TASKS if of.name in fine_tuned or t not in FINE_TUNED) for of in trials]
    found = all_results(root, list(zip(trials, tasks, strict=True)), jobs)
    return pd.DataFrame(
        [
            {"variant": trial.name, "seed": trial.seed}
            | {label: of[task][key] for label, (task, key) in (MEASURES | ON_VAL).items() if task in of}
            | {"rate": trial.rate, "tuned_lr": of.get(FINE_TUNED[0], {}).get("base_lr")}
            for trial, of in zip(trials, found, strict=True)
            if of is not None
        ]
    )


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


Cells = list[list[list[float]]]  # rows of cells of a value per seed


def page(rows: pd.DataFrame) -> str:
    """Write three tables: accuracies, and differences between variants and between methods, paired by seed."""
    measures = [label for label in MEASURES if label in rows]
    seeds = sorted(rows["seed"].unique())
    by = {variant: of.set_index("seed").reindex(seeds) for variant, of in rows.groupby("variant")}
    named = [name for name in VARIANTS if name in by]
    pairs = list(itertools.combinations(reversed(named), 2))
    shares = [(name, share) for name in named for share in ("1 %", "10 %")]
    ahead = [[(by[a][m] - by[b][m]).tolist() for m in measures] for a, b in pairs]
    added = [[(by[v][f"{share}, {how}"] - by[v][share]).tolist() for how in METHODS] for v, share in shares]
    lines = [
        f"# Digits, {len(seeds)} pre-training seeds",
        "",
        "Top-1 on test, %: mean ± half the 95 % interval over the seeds (Student's t), each a mean over five subsets.",
        "",
        *table(
            ["arm", "what", *measures],
            [[f"`{v}`", VARIANTS[v].what, *(text(by[v][m].tolist()) for m in measures)] for v in named],
        ),
        "",
        *said_of(ahead, "Ahead, paired by seed, in points."),
        "",
        *table(
            ["", *measures], [[f"`{a}` over `{b}`", *cells] for (a, b), cells in zip(pairs, marked(ahead), strict=True)]
        ),
        "",
        *said_of(added, "What a method adds to logistic regression on random images, paired by seed, in points."),
        "",
        *table(
            ["arm, labels", *METHODS],
            [[f"`{v}`, {share}", *cells] for (v, share), cells in zip(shares, marked(added), strict=True)],
        ),
        "",
    ]
    return "\n".join(lines)


def text(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± half the 95 % interval, a dash where a seed lacks."""
    if np.isnan(values).any():
        return "–"
    low, high = students_interval(values)
    return f"{(low + high) / 2:{sign}.1f} ± {(high - low) / 2:.1f}"


def decided(differences: Cells) -> np.ndarray:
    """Return which differences of a table are decided: p below 0.05 (paired t-test), Holm over those of its column."""
    p = np.array([[p_of_tie(values) for values in cells] for cells in differences])
    for of_measure in p.T:
        known = ~np.isnan(of_measure)
        of_measure[known] = holm(of_measure[known].tolist())
    return p < 0.05


def p_of_tie(values: Sequence[float]) -> float:
    """Return the two-sided p-value of a mean of 0 (paired t-test), also of values that are all the same."""
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(2 * t.sf(abs(np.mean(values)) / error, len(values) - 1)) if error else float(not np.mean(values))


def marked(differences: Cells) -> list[list[str]]:
    """Return the cells of a table of differences, the decided ones bold."""
    bold = decided(differences)
    return [
        [f"**{text(values, '+')}**" if bold[i, j] else text(values, "+") for j, values in enumerate(cells)]
        for i, cells in enumerate(differences)
    ]


def said_of(differences: Cells, what: str) -> list[str]:
    """Say what a table of differences shows, and what is bold."""
    return [
        f"{what} The interval is of the one comparison.",
        f"Bold is decided: p below 0.05, adjusted for the {len(differences)} comparisons of the column (Holm).",
        "A single comparison that was planned before needs no adjustment.",
    ]


def load_libraries() -> None:
    """Import what every stage needs, once for all of them."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork
    import mlflow
    import sklearn.linear_model
    import timm

    assert mlflow
    assert sklearn.linear_model
    assert timm
    sys.path.insert(0, str(ROOT))


def main() -> None:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tune", nargs="*", choices=TUNED, help="choose the rates of all variants, or of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="two or more, for an interval")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: all")
    parser.add_argument("--fine-tuned", nargs="*", choices=TRAINED, default=TUNED, help="default: the tuned")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one CPU core each")
    given = parser.parse_args()
    if set(TUNED_ON) & set(given.seeds):
        parser.error(f"seeds {', '.join(map(str, TUNED_ON))} chose the rates: give others")
    if len(given.seeds) < 2:
        parser.error("--seeds: two or more, for an interval")
    root, version = given.folder.resolve(), version_of_code()
    check_code(root, version)
    load_libraries()
    if given.tune is not None:
        names = given.tune or TUNED
        before = pd.read_csv(TUNING) if TUNING.exists() else pd.DataFrame(columns=["variant", "chosen", "rate"])
        of_mim = before.loc[(before["variant"] == "mim") & before["chosen"].astype(bool), "rate"]
        if "mim" not in names and of_mim.empty:
            parser.error("--tune: grafts start from mim, which has no rate yet: tune it too")
        tuned = tune(root, names, None if of_mim.empty else float(of_mim.iloc[0]), given.jobs).assign(code=version)
        tuning = pd.concat([before[~before["variant"].isin(names)], tuned], ignore_index=True)
        tuning.to_csv(TUNING, index=False)
        print(tuning.to_string(index=False))
        return
    rates = tuned_rates(version, given.variants)
    rows = seeds_of(root, given.seeds, given.variants, rates, given.fine_tuned, given.jobs).assign(code=version)
    rows.to_csv(OUT, index=False)
    OUT.with_suffix(".md").write_text(page(rows))
    print(OUT.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
