"""From metric files and predictions to the results table and the report page."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from lgp.arms import CURVES, METRICS, RECONSTRUCTIONS
from lgp.data.prepared import Prepared
from lgp.device import choose_device
from lgp.errors import LgpError
from lgp.evaluate.baselines import evaluate_baseline
from lgp.evaluate.outcome import Metrics, Outcome
from lgp.evaluate.run import feature_cache
from lgp.evaluate.statistics import Gap, accuracy_ci95, paired_gap
from lgp.figures import (
    plot_confusion,
    plot_curves,
    plot_depth,
    plot_label_efficiency,
    plot_mistakes,
    plot_per_class,
    plot_reconstructions,
)
from lgp.page import table as markdown_table
from lgp.page import to_html
from lgp.params import Params
from lgp.results import task_name, wide_rows

COLUMNS = ["arm", "task", "labels", "top1_mean", "top1_std", "subsets", "top1_ci95"]
MISTAKES = 24
TITLE = "Label efficiency"
# file → what it shows, in the order of the page
PICTURES = {
    "label_efficiency": "Accuracy over labels per class, with 95 % intervals",
    "accuracy_by_depth": "k-NN accuracy of the features after each block, all labels",
    "accuracy_per_class": "Accuracy per class at the fewest labels, by the champion's (per_class.csv has all tasks)",
    "confusion": "Confusion of the champion at the fewest labels, over all subsets",
    "worst_mistakes": "The champion's most confident mistakes with all labels (linear probe)",
    "curves": "Training losses, which cannot be compared with each other",
    "reconstructions": "What the masked autoencoder paints in",
}


@dataclass(frozen=True)
class ArmResults:
    """What all tasks of one arm yielded, by name: `linear`, `fewshot-1pct`, `finetune-10pct` and the like."""

    arm: str
    tasks: Mapping[str, Outcome]


@dataclass(frozen=True)
class Inputs:
    """Where the report finds what it reads.

    Attributes:
        metrics: arm and task → metric file.
        predictions: arm and task → predictions.
        arms: arm → folder of its pre-training.
    """

    metrics: Mapping[tuple[str, str], Path]
    predictions: Mapping[tuple[str, str], Path]
    arms: Mapping[str, Path]

    def read(self, arm: str) -> ArmResults:
        """Read the outcomes of an arm."""
        tasks = {
            task: Outcome(json.loads(path.read_text()), pd.read_parquet(self.predictions[of, task]))
            for (of, task), path in self.metrics.items()
            if of == arm
        }
        return ArmResults(arm, tasks)


def tasks_of(params: Params) -> list[str]:
    """Name the tasks that every arm of the parameters goes through."""
    few = [f"fewshot-{labels}" for labels in params.few_labels]
    return ["linear", *few, *(f"finetune-{labels}" for labels in params.finetuned)]


def results_table(arms: list[ArmResults]) -> pd.DataFrame:
    """Build the table of `COLUMNS`, accuracies in percent.

    `top1_ci95` is half the 95 % interval: over the subsets where there are several, else over the test images.
    """
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


def correct_by_subset(a: ArmResults, b: ArmResults, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Turn two arms' predictions into (subsets, images) bool each, whether they are right, of the same images.

    Raises:
        LgpError: they were not made on the same subsets and images.
    """
    rows = [x.tasks[task].predictions.sort_values(["subset", "id"], ignore_index=True) for x in (a, b)]
    same = ["subset", "id", "label"]
    if not rows[0][same].equals(rows[1][same]):
        raise LgpError(
            f"the predictions of {a.arm} and {b.arm} in {task} are of different subsets or test images: run "
            f"{task.partition('-')[0]} of both again on the same prepared data"
        )
    subsets = rows[0]["subset"].nunique()
    first, second = ((r["label"] == r["prediction"]).to_numpy().reshape(subsets, -1) for r in rows)
    return first, second


def gaps(arms: list[ArmResults]) -> list[tuple[str, str, str, Gap]]:
    """Compare every two arms in every task on the same subsets and test images: (task, arm ahead, other arm, gap)."""
    found = []
    for task in arms[0].tasks:
        for a, b in itertools.combinations(reversed(arms), 2):
            of_a, of_b = correct_by_subset(a, b, task)
            if of_a.mean() >= of_b.mean():
                found.append((task, a.arm, b.arm, paired_gap(of_a, of_b)))
            else:
                found.append((task, b.arm, a.arm, paired_gap(of_b, of_a)))
    return found


def champion(arms: list[ArmResults]) -> str:
    """Return the arm with the best validation accuracy of frozen features at the fewest labels."""
    fewest = _fewest(arms)
    return max(arms, key=lambda a: a.tasks[fewest].metrics["val/top1"]).arm


def write_report(
    params: Params, data: Prepared, inputs: Inputs, table: Path, classes: Path, page: Path, html: Path, figures: Path
) -> str:
    """Write the table, the page twice and the pictures.

    Args:
        params: arms, labels, and which baselines to evaluate.
        data: prepared images.
        inputs: what to report.
        table: results.csv.
        classes: per_class.csv: arm, task, class, top-1 in percent.
        page: report.md; names the pictures as `figures/…`.
        html: report.html, with the pictures in it.
        figures: existing folder for the pictures.

    Returns:
        The champion.
    """
    device, cache = choose_device(params.run), feature_cache(params)
    baselines = [
        ArmResults(name, evaluate_baseline(name, data, params, cache, device)) for name in params.report.baselines
    ]
    trained = [inputs.read(arm) for arm in inputs.arms]
    results, best = results_table([*baselines, *trained]), champion(trained)
    results.to_csv(table, index=False)
    per_class_table(trained, data.classes).to_csv(classes, index=False)
    _draw(figures, data, baselines, trained, best, results, inputs.arms)
    lines = _page(params, data, trained, best, results, inputs.arms)
    for name in _drawn(figures):
        lines += [f"**{PICTURES[name]}**", "", f"![{name.replace('_', ' ')}](figures/{name}.png)", ""]
    text = "\n".join(lines)
    page.write_text(text)
    # the pictures are still where a stage writes them first
    html.write_text(to_html(text.replace("](figures/", f"]({figures.name}/"), TITLE, figures.parent))
    return best


def _draw(
    figures: Path,
    data: Prepared,
    baselines: list[ArmResults],
    trained: list[ArmResults],
    best: str,
    results: pd.DataFrame,
    folders: Mapping[str, Path],
) -> None:
    plot_label_efficiency(figures / "label_efficiency.png", results, len(data.classes))
    depth = {a.arm: _by_depth(a.tasks["linear"].metrics) for a in [*baselines, *trained]}
    if any(depth.values()):
        plot_depth(figures / "accuracy_by_depth.png", {arm: values for arm, values in depth.items() if values})
    fewest = _fewest(trained)
    per_class = {a.arm: accuracy_per_class(a.tasks[fewest].predictions, len(data.classes)) for a in trained}
    plot_per_class(figures / "accuracy_per_class.png", per_class, data.classes, best, task_name(fewest))
    of_best = next(a for a in trained if a.arm == best)
    plot_confusion(figures / "confusion.png", of_best.tasks[fewest].predictions, data.classes)
    wrong = worst_mistakes(of_best.tasks["linear"].predictions)
    if len(wrong):
        images = data.whole(wrong["id"].to_numpy()).permute(0, 2, 3, 1).numpy()
        plot_mistakes(figures / "worst_mistakes.png", images, wrong, data.classes, best)
    curves = {arm: folder / CURVES for arm, folder in folders.items() if (folder / CURVES).exists()}
    if curves:
        plot_curves(figures / "curves.png", {arm: pd.read_csv(curve) for arm, curve in curves.items()})
    pictures = [folder / RECONSTRUCTIONS for folder in folders.values() if (folder / RECONSTRUCTIONS).exists()]
    if pictures:
        plot_reconstructions(figures / "reconstructions.png", load_file(pictures[0]))


def _drawn(figures: Path) -> list[str]:
    """Name the pictures that were drawn, in the order of the page."""
    return [name for name in PICTURES if (figures / f"{name}.png").exists()]


def _fewest(arms: list[ArmResults]) -> str:
    """Name the frozen-feature task with the fewest labels."""
    few = [task for task in arms[0].tasks if task.startswith("fewshot-")]
    return min(few, key=lambda task: arms[0].tasks[task].metrics["labels"])


def _by_depth(metrics: Metrics) -> list[float]:
    found = {name: value for name, value in metrics.items() if name.startswith("test/knn_top1_block")}
    return [found[f"test/knn_top1_block{b}"] for b in range(len(found))]


def accuracy_per_class(predictions: pd.DataFrame, classes: int) -> np.ndarray:
    """Return accuracy per class in percent over all subsets, (classes,); NaN where test has no image of a class."""
    correct = (predictions["label"] == predictions["prediction"]).groupby(predictions["label"]).mean()
    return 100 * correct.reindex(range(classes)).to_numpy(dtype=np.float64)


def per_class_table(arms: list[ArmResults], classes: list[str]) -> pd.DataFrame:
    """Return accuracy per class, in percent, of every arm and task: a row each."""
    tables = [
        pd.DataFrame({"arm": a.arm, "task": task, "class": classes, "top1": accuracy.round(2)})
        for a in arms
        for task, outcome in a.tasks.items()
        for accuracy in [accuracy_per_class(outcome.predictions, len(classes))]
    ]
    return pd.concat(tables, ignore_index=True)


def worst_mistakes(predictions: pd.DataFrame) -> pd.DataFrame:
    """Return the wrong predictions of the first subset that were made with the most confidence."""
    first = predictions[(predictions["subset"] == 0) & (predictions["label"] != predictions["prediction"])]
    return first.sort_values(["confidence", "id"], ascending=[False, True]).head(MISTAKES)


def _page(
    params: Params,
    data: Prepared,
    trained: list[ArmResults],
    best: str,
    results: pd.DataFrame,
    folders: Mapping[str, Path],
) -> list[str]:
    header, rows = wide_rows([{str(k): str(v) for k, v in row.items()} for row in results.to_dict("records")])
    lines = [f"# {TITLE}", "", _setting(params, data), ""]
    lines.append(
        "Top-1 accuracy on test in percent, ± half its 95 % interval: over the subsets of labels; of k-NN, the linear "
        "probe and all that has a single subset over the test images."
    )
    lines += ["", *markdown_table(header, rows)]
    lines += ["", "## Paired comparison", ""]
    lines.append(
        "The same subsets and test images for both arms; the interval (bootstrap over images, Student's t over "
        "subsets) is of one pre-training each: another seed moves these numbers too."
    )
    found = gaps(trained)
    compared = [[g.sentence(a, b), task_name(task), f"[{g.low:+.1f}, {g.high:+.1f}]", f"{g.won} of {g.subsets}"]
                for task, a, b, g in found]  # fmt: skip
    if compared:
        lines += [
            "",
            *markdown_table(["", "labels", "95 % interval", "subsets won"], compared),
        ]
    lines += ["", "## More measures", "", "On test: top-5 and expected calibration error (15 bins), percent.", ""]
    lines += markdown_table(["arm", "task", "subsets", "top-1", "top-5", "calibration error"], _measures(trained))
    trainings = {arm: json.loads((folder / METRICS).read_text()) for arm, folder in folders.items()}
    compute = [[arm, f"{m['train/pflop_total']:.3g}"] for arm, m in trainings.items() if "train/pflop_total" in m]
    lines += ["", "## Compute", "", "Pre-training, counted on the first step, what an arm started from included.", ""]
    lines += markdown_table(["arm", "PFLOP"], compute)
    return [*lines, "", f"Champion (best validation accuracy at the fewest labels): **{best}**", ""]


def _measures(trained: list[ArmResults]) -> list[list[str]]:
    def cell(metrics: Metrics, name: str) -> str:
        return f"{metrics[name]:.1f}" if name in metrics else "–"

    return [
        [
            a.arm,
            task_name(task),
            f"{outcome.metrics['subsets']:.0f}",
            *(cell(outcome.metrics, f"test/{name}") for name in ("top1", "top5", "ece")),
        ]
        for a in trained
        for task, outcome in a.tasks.items()
    ]


def _setting(params: Params, data: Prepared) -> str:
    model, size = params.model, data.image_size
    counts = ", ".join(f"{len(data.ids(split))} {split}" for split in ("train", "unlabeled", "val", "test"))
    return (
        f"`{params.data.source}`: {counts} images of {size}×{size}×{data.channels} in {len(data.classes)} classes. "
        f"ViT of width {model.width}, depth {model.depth}, {model.heads} heads, patch {model.patch_size}; "
        f"seed {params.seed}."
    )
