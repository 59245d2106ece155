"""From metric files to the results table and the report page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load_file

from lgp.arms import CURVES, METRICS, RECONSTRUCTIONS
from lgp.data.prepared import Prepared
from lgp.device import choose_device
from lgp.evaluate.baselines import evaluate_baseline
from lgp.evaluate.outcome import ArmResults, Metrics
from lgp.figures import plot_curves, plot_label_efficiency, plot_reconstructions
from lgp.params import Params
from lgp.results import wide_rows

COLUMNS = ["arm", "task", "labels", "top1_mean", "top1_std", "subsets"]


def read_arm(metrics: Path, arm: str, shares: list[str]) -> ArmResults:
    """Read the metric files of an arm from the folder `metrics`."""

    def read(task: str) -> Metrics:
        values: Metrics = json.loads((metrics / f"{arm}-{task}.json").read_text())
        return values

    return ArmResults(arm, read("linear"), {share: read(f"fewshot-{share}") for share in shares})


def results_table(arms: list[ArmResults]) -> pd.DataFrame:
    """Build the table `arm,task,labels,top1_mean,top1_std,subsets`, accuracies in percent."""
    rows: list[list[Any]] = []
    for a in arms:
        labels = int(a.linear["labels"])
        rows.append([a.arm, "knn", labels, a.linear["test/knn_top1"], 0.0, 1])
        rows.append([a.arm, "linear", labels, a.linear["test/top1"], 0.0, 1])
        for share, m in a.fewshot.items():
            task = f"fewshot-{share}"
            rows.append([a.arm, task, int(m["labels"]), m["test/top1"], m["test/top1_std"], int(m["subsets"])])
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.round({"top1_mean": 2, "top1_std": 2})


def paired_gap(a: Metrics, b: Metrics) -> tuple[float, float, int, int]:
    """Compare two arms on the same subsets: mean gap in points, its standard error, subsets won, subsets."""
    names = [n for n in a if n.startswith("test/top1_subset")]
    gaps = np.array([a[n] - b[n] for n in names])
    return float(gaps.mean()), float(gaps.std(ddof=1) / np.sqrt(len(gaps))), int((gaps > 0).sum()), len(gaps)


def champion(arms: list[ArmResults]) -> str:
    """Return the arm with the best validation accuracy at the smallest share of labels."""
    share = min(arms[0].fewshot, key=lambda s: arms[0].fewshot[s]["labels"])
    return max(arms, key=lambda a: a.fewshot[share]["val/top1"]).arm


def write_page(
    path: Path,
    setting: str,
    table: pd.DataFrame,
    arms: list[ArmResults],
    compute: Mapping[str, float],
    best: str,
    figures: Sequence[str],
) -> None:
    """Write report.md.

    Args:
        path: of the page.
        setting: what was trained on what, a sentence.
        table: of `results_table`.
        arms: the trained ones.
        compute: arm → PFLOP of its pre-training, what it started from included.
        best: the champion's name.
        figures: file names of the pictures, which will lie in `figures/` beside the page.
    """
    header, rows = wide_rows([{str(k): str(v) for k, v in row.items()} for row in table.to_dict("records")])
    lines = [
        "# Label efficiency",
        "",
        setting,
        "",
        "Top-1 accuracy on test in percent; ± is the standard deviation over subsets.",
        "",
    ]
    lines += _markdown(header, rows)
    lines += ["", "## Paired over the same subsets", ""]
    reference = next((a for a in arms if a.arm == "graft"), arms[-1])
    gaps = []
    for other in (a for a in arms if a is not reference):
        for share, metrics in reference.fewshot.items():
            gap, error, won, of = paired_gap(metrics, other.fewshot[share])
            pair, labels = f"{reference.arm} over {other.arm}", share.replace("pct", " %")
            gaps.append([pair, labels, f"{gap:+.1f} ± {error:.1f}", f"{won} of {of}"])
    lines += _markdown(["", "labels", "points (± standard error)", "subsets won"], gaps)
    lines += ["", "## Compute", "", "Pre-training, counted on the first step, what an arm started from included.", ""]
    lines += _markdown(["arm", "PFLOP"], [[arm, f"{value:.3g}"] for arm, value in compute.items()])
    lines += ["", f"Champion (best validation accuracy at the fewest labels): **{best}**", ""]
    for figure in figures:
        lines += [f"![{Path(figure).stem.replace('_', ' ')}](figures/{figure})", ""]
    path.write_text("\n".join(lines))


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def write_report(
    params: Params, data: Prepared, metrics: Path, arms: Mapping[str, Path], table: Path, page: Path, figures: Path
) -> str:
    """Write the table, the page and the pictures.

    Args:
        params: shares of labels, and which baselines to evaluate.
        data: prepared images, for the baselines.
        metrics: folder of the metric files.
        arms: arm → folder of its pre-training.
        table: results.csv.
        page: report.md; names the pictures as `figures/…`.
        figures: existing folder for the pictures.

    Returns:
        The champion: the arm with the best validation accuracy at the fewest labels.
    """
    device = choose_device(params.run)
    baselines = [evaluate_baseline(name, data, params, device) for name in params.report.baselines]
    trained = [read_arm(metrics, arm, list(params.data.few_label_shares)) for arm in arms]
    results = results_table([*baselines, *trained])
    results.to_csv(table, index=False)
    best = champion(trained)
    plot_label_efficiency(figures / "label_efficiency.png", results)
    curves = {arm: folder / CURVES for arm, folder in arms.items() if (folder / CURVES).exists()}
    if curves:
        plot_curves(figures / "curves.png", {arm: pd.read_csv(curve) for arm, curve in curves.items()})
    pictures = [folder / RECONSTRUCTIONS for folder in arms.values() if (folder / RECONSTRUCTIONS).exists()]
    if pictures:
        plot_reconstructions(figures / "reconstructions.png", load_file(pictures[0]))
    trainings = {arm: json.loads((folder / METRICS).read_text()) for arm, folder in arms.items()}
    compute = {arm: m["train/pflop_total"] for arm, m in trainings.items() if "train/pflop_total" in m}
    drawn = [
        name for name in ("label_efficiency.png", "curves.png", "reconstructions.png") if (figures / name).exists()
    ]
    write_page(page, _setting(params, data), results, trained, compute, best, drawn)
    return best


def _setting(params: Params, data: Prepared) -> str:
    model, size = params.model, data.image_size
    counts = ", ".join(f"{len(data.ids(split))} {split}" for split in ("train", "unlabeled", "val", "test"))
    return (
        f"`{params.data.source}`: {counts} images of {size}×{size}×{data.channels} in {len(data.classes)} classes. "
        f"ViT of width {model.width}, depth {model.depth}, {model.heads} heads, patch {model.patch_size}; "
        f"seed {params.seed}."
    )
