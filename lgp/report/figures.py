"""The pictures of the report: accuracies, loss curves, reconstructions, confusion, mistakes, gradient conflict.

Names of classes stand as they are: a `$` in one begins no formula. Of images of more than four channels the first three
are drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lgp.data.contact_sheet import thumbnail
from lgp.evaluate.calibration import Reliability
from lgp.report.drawing import save, short, with_names

COLOURS = {"pixels": "0.6", "random": "0.4", "mim": "tab:blue", "cl": "tab:orange", "graft": "tab:green"}
# method → title of its plot
METHODS = {
    "fewshot": "frozen features",
    "propagate": "labels propagated",
    "selected": "images selected",
    "selected, propagated": "selected and propagated",
    "finetune": "fine-tuned",
    "semi": "semi-supervised",
}
SHOWN_CLASSES = 20
MOST_CELLS = 250  # rows of a confusion matrix: the picture has about 400 pixels for them
MISTAKES_A_ROW = 8
METHODS_A_ROW = 3


@with_names
def plot_label_efficiency(path: Path, table: pd.DataFrame, classes: int) -> None:
    """Draw accuracy over labels per class with 95 % intervals: a plot for each method, a line for each arm.

    The grey lines of a plot are those of logistic regression on frozen features.
    """
    method = table["task"].map(_method)
    methods = [name for name in METHODS if (method == name).any()]
    columns = min(len(methods), METHODS_A_ROW)
    rows_of_plots = -(-len(methods) // columns)
    figure = Figure(figsize=(1.2 + 2.6 * columns, 0.7 + 3 * rows_of_plots), layout="constrained")
    all_axes = list(figure.subplots(rows_of_plots, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes in all_axes[len(methods) :]:
        axes.remove()
    for name, axes in zip(methods, all_axes, strict=False):
        for _, of_arm in table[method == methods[0]].sort_values("labels").groupby("arm"):
            axes.plot(of_arm["labels"] / classes, of_arm["top1_mean"], color="0.85", zorder=0)
        _plot_method(axes, table[method == name], classes)
        axes.set_title(METHODS[name], fontsize=10)
    figure.supxlabel("labels per class", fontsize=10)
    figure.supylabel("test top-1, %", fontsize=10)
    all_axes[0].legend()
    save(figure, path)


def _plot_method(axes: Axes, table: pd.DataFrame, classes: int) -> None:
    for arm, rows in table.sort_values("labels", kind="stable").groupby("arm", sort=False):
        axes.errorbar(
            rows["labels"] / classes,
            rows["top1_mean"],
            [rows["top1_mean"] - rows["top1_low"], rows["top1_high"] - rows["top1_mean"]],
            label=str(arm),
            marker="o",
            capsize=3,
            color=COLOURS.get(str(arm)),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def _method(task: str) -> str:
    """Return the method of a task, of `METHODS`; k-NN has none."""
    kind, _, labels = task.partition("-")
    return f"{kind}, propagated" if labels.endswith("-propagated") else "fewshot" if kind == "linear" else kind


@with_names
def plot_reliability(path: Path, of_tasks: Mapping[str, Reliability], arm: str) -> None:
    """Draw accuracy over confidence in each bin, a line for each task. On the diagonal probabilities are right."""
    figure = Figure(figsize=(5.0, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":")
    for task, points in of_tasks.items():
        axes.plot(points.confidence, points.accuracy, marker="o", markersize=3, label=task)
    axes.set(xlabel="confidence", ylabel="share of right predictions", title=arm, xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


@with_names
def plot_depth(path: Path, by_arm: Mapping[str, Sequence[float]]) -> None:
    """Draw k-NN accuracy of the features after each block."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for arm, accuracies in by_arm.items():
        axes.plot(range(1, len(accuracies) + 1), accuracies, marker="o", label=arm, color=COLOURS.get(arm))
    axes.set(xlabel="after block", ylabel="k-NN test top-1, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


@with_names
def plot_per_class(path: Path, by_arm: Mapping[str, np.ndarray], classes: Sequence[str], best: str, title: str) -> None:
    """Draw accuracy per class, a bar for each arm.

    Classes are sorted by the accuracy of the arm `best`. Of more than 20 classes the lowest and highest 10 are drawn.
    """
    order = np.argsort(np.nan_to_num(by_arm[best], nan=-1.0), kind="stable")
    if len(order) > SHOWN_CLASSES:
        order = np.concatenate([order[: SHOWN_CLASSES // 2], order[-SHOWN_CLASSES // 2 :]])
    figure = Figure(figsize=(max(5.4, 0.45 * len(order)), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(by_arm)
    for number, (arm, accuracies) in enumerate(by_arm.items()):
        places = np.arange(len(order)) + (number - (len(by_arm) - 1) / 2) * width
        axes.bar(places, accuracies[order], width, label=arm, color=COLOURS.get(arm))
    names, rotation = [short(classes[i]) for i in order], 90 if len(order) > 10 else 0
    axes.set_xticks(range(len(order)), names, rotation=rotation)
    axes.set(ylabel="test top-1, %", title=title)
    axes.legend()
    save(figure, path)


@with_names
def plot_mistakes(path: Path, images: np.ndarray, mistakes: pd.DataFrame, classes: Sequence[str], arm: str) -> None:
    """Draw the images (B, H, W, C) uint8 of wrong predictions, each with its label and its prediction."""
    columns = min(len(images), MISTAKES_A_ROW)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.65 * rows + 0.4), layout="constrained")
    figure.suptitle(f"Most confident mistakes of {arm}, linear probe")
    all_axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes:
        axes.axis("off")
    columns_of = (mistakes[name].tolist() for name in ("label", "prediction", "confidence"))
    for axes, image, label, prediction, confidence in zip(all_axes, images, *columns_of, strict=False):
        axes.imshow(thumbnail(image, max(image.shape[:2])))
        said = f"{short(classes[label])}, taken\nfor {short(classes[prediction])} ({100 * confidence:.0f} %)"
        axes.set_title(said, fontsize=7)
    save(figure, path)


@with_names
def plot_curves(path: Path, curves: Mapping[str, pd.DataFrame]) -> None:
    """Draw the training loss over epochs, one plot per arm. The losses of different arms are not comparable."""
    figure = Figure(figsize=(3.4 * len(curves), 3), layout="constrained")
    all_axes = figure.subplots(1, len(curves), squeeze=False)
    for axes, (arm, curve) in zip(all_axes[0], curves.items(), strict=True):
        axes.plot(curve["epoch"], curve["train/loss"], color=COLOURS.get(arm))
        axes.set(title=arm, xlabel="epoch", ylabel="loss")
        axes.grid(alpha=0.3)
    save(figure, path)


@with_names
def plot_reconstructions(path: Path, images: Mapping[str, Tensor]) -> None:
    """Draw the rows `original`, `masked` (the input) and `painted`; each (B, C, H, W) in [0, 1]."""
    titles = ("original", "masked", "painted")
    columns = len(images["original"])
    figure = Figure(figsize=(columns * 0.9, 3), layout="constrained")
    all_axes = figure.subplots(len(titles), columns, squeeze=False)
    for title, row_axes in zip(titles, all_axes, strict=True):
        for image, axes in zip(images[title], row_axes, strict=True):
            pixels = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            axes.imshow(thumbnail(pixels, max(pixels.shape[:2])))
            axes.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(title)
    save(figure, path)


@with_names
def plot_confusion(path: Path, predictions: pd.DataFrame, classes: list[str]) -> None:
    """Draw the confusion matrix over all subsets, each row (true class) in percent.

    The picture has room for `MOST_CELLS` rows. With more classes a row and a column stand for neighbouring classes.
    """
    share, together = confusion(predictions, len(classes))
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if len(classes) <= 20:
        axes.set_xticks(range(len(classes)), map(short, classes), rotation=90)
        axes.set_yticks(range(len(classes)), map(short, classes))
    of = "" if together == 1 else f", {together} classes each"
    axes.set(xlabel=f"predicted{of}", ylabel=f"true{of}")
    figure.colorbar(image, label="% of the true class" if together == 1 else "% of the true classes")
    save(figure, path)


def confusion(predictions: pd.DataFrame, classes: int) -> tuple[np.ndarray, int]:
    """Return the confusion matrix in percent of a row, at most `MOST_CELLS` square, and how many classes a row holds.

    Args:
        predictions: columns `label` and `prediction`.
        classes: their number.
    """
    together = -(-classes // MOST_CELLS)
    cells = -(-classes // together)
    counts = np.zeros((cells, cells))
    np.add.at(counts, tuple(predictions[column].to_numpy() // together for column in ("label", "prediction")), 1)
    return 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), together


@with_names
def plot_conflict(path: Path, conflict: pd.DataFrame) -> None:
    """Draw the cosine of the gradients of MIM and CL over batches, as a box per part of the encoder."""
    parts = {str(part): rows["cosine"].to_numpy() for part, rows in conflict.groupby("block", sort=False)}
    figure = Figure(figsize=(max(4.5, 0.6 * len(parts) + 1.5), 3.6), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(list(parts.values()), tick_labels=[part.removeprefix("block") for part in parts], showfliers=False)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set(xlabel="block", ylabel="cosine of the gradients of MIM and CL")
    axes.grid(alpha=0.3, axis="y")
    save(figure, path)
