"""The report: tables, one page as Markdown and as HTML, pictures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lgp.compute.intact import reading
from lgp.data.labels import LabelledImages
from lgp.evaluate.calibration import reliability
from lgp.features.cache import Features
from lgp.models.files import CURVES, RECONSTRUCTIONS, check_beside
from lgp.models.heads_file import load_beside
from lgp.params.arms import how_to_get
from lgp.params.file import Params
from lgp.report import figures
from lgp.report.embedding import EmbeddingMap, embedding_map
from lgp.report.outcomes import (
    ArmOutcomes,
    Inputs,
    accuracy_by_depth,
    accuracy_per_class,
    confidence_by_subset,
    fewest_labels,
    leader,
    worst_mistakes,
)
from lgp.report.page import PICTURES, TITLE, page_of, to_html
from lgp.report.table import per_class_table, results_table, task_name
from lgp.report.verdict import Verdict, judge

MISTAKES = 24


@dataclass(frozen=True)
class Outputs:
    """The files that the report writes.

    Attributes:
        table: results.csv.
        verdict: verdict.txt, a line each: answer and verdict, then notes.
        classes: per_class.csv: arm, task, class, top-1 in percent.
        page: report.md, which names the pictures as `figures/…`.
        html: report.html, with the pictures in it.
        figures: existing folder for the pictures.
    """

    table: Path
    verdict: Path
    classes: Path
    page: Path
    html: Path
    figures: Path


def write_report(
    params: Params, data: LabelledImages, inputs: Inputs, features_of: Callable[[str], Features], out: Outputs
) -> Verdict:
    """Write the tables, the verdict, the page twice and the pictures.

    Args:
        params: the parameters that ran.
        data: images and labels.
        inputs: the files to read.
        features_of: returns the features of an arm.
        out: the files to write.
    """
    arms = inputs.read()
    results, verdict = results_table(arms), judge(arms, data, params.graft.start)
    results.to_csv(out.table, index=False)
    out.verdict.write_text("".join(f"{line}\n" for line in verdict.lines), encoding="utf-8")
    per_class_table(arms, data.classes).to_csv(out.classes, index=False)
    _draw_results(out.figures, arms, results, data)
    _draw_trainings(out.figures, inputs.arms)
    best, live = leader(arms), {}
    if best and (drawn_map := _map(best, features_of(best.arm), data, params.seed)):
        drawn_map.draw(out.figures / "map.png", best.arm)
        live["map"] = drawn_map.page(data)
    drawn = [name for name in PICTURES if (out.figures / f"{name}.png").exists()]
    text = page_of(params, data, arms, verdict, results, inputs.arms, drawn)
    out.page.write_text(text, encoding="utf-8")
    # the pictures are still in the place where a stage writes them first
    text = text.replace("](figures/", f"]({out.figures.name}/")
    out.html.write_text(to_html(text, TITLE, out.figures.parent, live), encoding="utf-8")
    return verdict


def _map(best: ArmOutcomes, features: Features, data: LabelledImages, seed: int) -> EmbeddingMap | None:
    return embedding_map(features, best.tasks["linear"].predictions, data.classes, seed)


def _draw_results(folder: Path, arms: list[ArmOutcomes], results: pd.DataFrame, data: LabelledImages) -> None:
    classes, fewest = data.classes, fewest_labels(arms)
    figures.plot_label_efficiency(folder / "label_efficiency.png", results, len(classes))
    by_depth = {a.arm: accuracy_by_depth(a.tasks["linear"]) for a in arms}
    if any(by_depth.values()):
        figures.plot_depth(
            folder / "accuracy_by_depth.png", {arm: values for arm, values in by_depth.items() if values}
        )
    best = leader(arms)
    if best is None:
        return
    per_class = {
        a.arm: accuracy_per_class(a.tasks[fewest].predictions, len(classes)) for a in arms if not a.is_baseline
    }
    figures.plot_per_class(folder / "accuracy_per_class.png", per_class, classes, best.arm, task_name(fewest))
    of_tasks = {
        task_name(task): reliability(*(values.ravel() for values in confidence_by_subset(outcome)))
        for task, outcome in best.tasks.items()
    }
    figures.plot_reliability(folder / "reliability.png", of_tasks, best.arm)
    figures.plot_confusion(folder / "confusion.png", best.tasks[fewest].predictions, classes)
    wrong = worst_mistakes(best.tasks["linear"].predictions, MISTAKES)
    if len(wrong):
        images = data.whole(wrong["id"].to_numpy()).permute(0, 2, 3, 1).numpy()
        figures.plot_mistakes(folder / "worst_mistakes.png", images, wrong, classes, best.arm)


def _draw_trainings(folder: Path, arms: Mapping[str, Path]) -> None:
    curves = {arm: _curve(of_arm) for arm, of_arm in arms.items() if (of_arm / CURVES).exists()}
    if curves:
        figures.plot_curves(folder / "curves.png", curves)
    pictured = [of_arm for of_arm in arms.values() if (of_arm / RECONSTRUCTIONS).exists()]
    if pictured:
        figures.plot_reconstructions(folder / "reconstructions.png", load_beside(pictured[0], RECONSTRUCTIONS))


def _curve(arm: Path) -> pd.DataFrame:
    check_beside(arm, CURVES)
    with reading(arm / CURVES, how_to_get(arm.name)):
        return pd.read_csv(arm / CURVES)[["epoch", "train/loss"]].astype(float)
