"""results.csv as people read it: a line per arm, a column per task. Light, for the command line."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from lgp.errors import LgpError


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
    """Turn rows of results.csv into a header and one line per arm: k-NN, linear, then the shares."""
    tasks = list(dict.fromkeys(r["task"] for r in results))
    arms = list(dict.fromkeys(r["arm"] for r in results))
    header = ["arm", *(_heading(task, next(r["labels"] for r in results if r["task"] == task)) for task in tasks)]
    cells = {(r["arm"], r["task"]): _cell(r) for r in results}
    return header, [[arm, *(cells.get((arm, task), "–") for task in tasks)] for arm in arms]


def task_name(task: str) -> str:
    """Say a task as people do: `fewshot-1pct` is `1 %`, `finetune-5shot` is `fine-tuned, 5 a class`."""
    names = {"knn": "k-NN", "linear": "linear"}
    if task in names:
        return names[task]
    kind, _, labels = task.partition("-")
    said = re.sub(r"^(\d+)shot$", r"\1 a class", re.sub(r"^(\d+)pct$", r"\1 %", labels))
    return f"fine-tuned, {said}" if kind == "finetune" else said


def _heading(task: str, labels: str) -> str:
    return f"{task_name(task)} ({labels} labels)"


def _cell(row: Mapping[str, str]) -> str:
    return f"{float(row['top1_mean']):.1f} ± {float(row['top1_ci95']):.1f}"
