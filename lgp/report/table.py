"""The tables: results.csv, per_class.csv, and results.csv for reading. It imports little, for the command line."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgp.errors import LgpError

if TYPE_CHECKING:
    import pandas as pd

    from lgp.report.outcomes import ArmOutcomes

COLUMNS = ["arm", "task", "labels", "top1_mean", "top1_std", "subsets", "top1_ci95"]


def results_table(arms: "list[ArmOutcomes]") -> "pd.DataFrame":
    """Build the table of `COLUMNS`, accuracies in percent.

    `top1_ci95` is half the 95 % interval. It is over the subsets where there are several, else over the test images.
    """
    import pandas as pd

    from lgp.evaluate.statistics import accuracy_ci95

    rows: list[list[Any]] = []
    for a in arms:
        images = len(a.tasks["linear"].predictions)
        for task, outcome in a.tasks.items():
            m, labels = outcome.metrics, int(outcome.metrics["labels"])
            if task == "linear":
                knn = m["test/knn_top1"]
                rows.append([a.arm, "knn", labels, knn, 0.0, 1, accuracy_ci95(knn, images)])
            top1 = m["test/top1"]
            ci95 = m.get("test/top1_ci95", accuracy_ci95(top1, images))
            rows.append([a.arm, task, labels, top1, m.get("test/top1_std", 0.0), int(m["subsets"]), ci95])
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.round({"top1_mean": 4, "top1_std": 4, "top1_ci95": 4})


def per_class_table(arms: "list[ArmOutcomes]", classes: list[str]) -> "pd.DataFrame":
    """Return accuracy per class in percent: a row per arm, task and class."""
    import pandas as pd

    from lgp.report.outcomes import accuracy_per_class

    tables = [
        pd.DataFrame({"arm": a.arm, "task": task, "class": classes, "top1": accuracy.round(2)})
        for a in arms
        for task, outcome in a.tasks.items()
        for accuracy in [accuracy_per_class(outcome.predictions, len(classes))]
    ]
    return pd.concat(tables, ignore_index=True)


def read_results(path: Path) -> list[dict[str, str]]:
    """Read results.csv as text cells; raise `LgpError` where there is none."""
    if not path.exists():
        raise LgpError(f"no results in {path}: run `dvc repro` (or `make repro`) first")
    with path.open(newline="") as file:
        results = list(csv.DictReader(file))
    if results and "top1_ci95" not in results[0]:
        raise LgpError(f"{path} is of an older version, without intervals: run `lgp report` (or `dvc repro`) again")
    return results


def wide_rows(results: list[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Turn rows of results.csv into a header and one line per arm: k-NN, linear, then the few labels."""
    tasks = list(dict.fromkeys(r["task"] for r in results))
    arms = list(dict.fromkeys(r["arm"] for r in results))
    header = ["arm", *(_heading(task, next(r["labels"] for r in results if r["task"] == task)) for task in tasks)]
    cells = {(r["arm"], r["task"]): _cell(r) for r in results}
    return header, [[arm, *(cells.get((arm, task), "–") for task in tasks)] for arm in arms]


def task_name(task: str) -> str:
    """Return the name of a task for readers: `fewshot-1pct` is `1 %`, `finetune-5shot` is `fine-tuned, 5 a class`."""
    names = {"knn": "k-NN", "linear": "linear"}
    if task in names:
        return names[task]
    kind, _, labels = task.partition("-")
    name = re.sub(r"^(\d+)shot$", r"\1 a class", re.sub(r"^(\d+)pct$", r"\1 %", labels))
    return f"fine-tuned, {name}" if kind == "finetune" else name


def _heading(task: str, labels: str) -> str:
    return f"{task_name(task)} ({labels} labels)"


def _cell(row: Mapping[str, str]) -> str:
    return f"{float(row['top1_mean']):.1f} ± {float(row['top1_ci95']):.1f}"
