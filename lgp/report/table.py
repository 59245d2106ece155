"""The tables: results.csv, per_class.csv; results.csv and verdict.txt for reading, with few imports (`lgp results`)."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgp.compute.intact import Damaged, reading
from lgp.errors import LgpError

if TYPE_CHECKING:
    import pandas as pd

    from lgp.report.outcomes import ArmOutcomes

ADDED = ("propagate", "selected")  # stages whose tasks add unlabelled or chosen images to few labels
COLUMNS = ["arm", "task", "labels", "top1_mean", "top1_std", "subsets", "top1_low", "top1_high"]


def results_table(arms: "list[ArmOutcomes]") -> "pd.DataFrame":
    """Build the table of `COLUMNS`, accuracies in percent.

    `top1_low` and `top1_high` are the 95 % interval, over test images and subsets of labels together.

    Raises:
        LgpError: a metric file has no intervals.
    """
    import pandas as pd

    rows: list[list[Any]] = []
    for a in arms:
        for task, outcome in a.tasks.items():
            m = outcome.metrics
            for shown, name in ((("knn", "test/knn_top1"),) if task == "linear" else ()) + ((task, "test/top1"),):
                if f"{name}_low" not in m:
                    raise LgpError(
                        f"metrics/{a.arm}-{task}.json is of an older version, without {name}_low: run "
                        f"{task.partition('-')[0]} of every arm again (or `dvc repro`)"
                    )
                interval = (m[f"{name}_low"], m[f"{name}_high"])
                std, subsets = m.get(f"{name}_std", 0.0), int(m["subsets"])
                rows.append([a.arm, shown, int(m["labels"]), m[name], std, subsets, *interval])
    return pd.DataFrame(rows, columns=COLUMNS)


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
        raise LgpError(f"no results in {path}: run `dvc repro` first")
    with reading(path, "run `lgp report`", csv.Error), path.open(newline="", encoding="utf-8") as file:
        results = list(csv.DictReader(file))
        if not results:
            raise Damaged(path, "it has no row", "run `lgp report`")
    missing = [column for column in COLUMNS if column not in results[0]]
    if missing:
        raise LgpError(f"{path} is of an older version, without {', '.join(missing)}: run `dvc repro` again")
    return results


def read_verdict(path: Path) -> list[str]:
    """Read verdict.txt: the verdict, then its notes; raise `LgpError` where there is none."""
    if not path.exists():
        raise LgpError(f"no verdict in {path}, which belongs to the table: run `lgp report` (or `dvc repro`) again")
    return path.read_text(encoding="utf-8").splitlines()


def plain_and_added(results: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Part rows of results.csv: those of labelled images alone, and those that add unlabelled or chosen images."""
    added = [row for row in results if row["task"].partition("-")[0] in ADDED]
    return [row for row in results if row not in added], added


def wide_rows(results: list[dict[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Turn rows of results.csv into a header and one line per arm, with a column for each task."""
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
    labels, _, spread = labels.partition("-")
    name = re.sub(r"^(\d+)shot$", r"\1 a class", re.sub(r"^(\d+)pct$", r"\1 %", labels))
    chosen = f"{name}, selected{' and propagated' if spread else ''}"
    names |= {"finetune": f"fine-tuned, {name}", "semi": f"semi-supervised, {name}"}
    names |= {"propagate": f"{name}, propagated", "selected": chosen}
    return names.get(kind, name)


def _heading(task: str, labels: str) -> str:
    return f"{task_name(task)} ({labels} labels)"


def _cell(row: Mapping[str, str]) -> str:
    mean, low, high = (float(row[column]) for column in ("top1_mean", "top1_low", "top1_high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"
