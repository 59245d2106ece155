"""The page of the report, as Markdown and as one HTML file that works offline."""

import base64
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from markdown_it import MarkdownIt

from lgp.compute.units import flop_text
from lgp.data.labels import LabelledImages
from lgp.data.sources.opening import said
from lgp.evaluate.calibration import calibration_interval
from lgp.evaluate.outcome import COVERAGES
from lgp.models.files import read_arm_metrics
from lgp.params.file import Params
from lgp.report.gains import COLUMNS, SEMI, Gain
from lgp.report.outcomes import ArmOutcomes, confidence_by_subset, leader
from lgp.report.pairs import Pair
from lgp.report.table import plain_and_added, task_name, wide_rows
from lgp.report.verdict import Verdict

TITLE = "Label efficiency"
# file → what it shows, in the order of the page
PICTURES = {
    "label_efficiency": "Accuracy over labels per class, with 95 % intervals",
    "map": "The leader's features of the test images and its mistakes, linear probe (t-SNE: only near points say much)",
    "accuracy_by_depth": "k-NN accuracy of the features after each block, all labels",
    "accuracy_per_class": "Accuracy per class at the fewest labels, sorted by the leader's (all: per_class.csv)",
    "reliability": "How often the leader is right, over how sure it is, for each of its tasks",
    "confusion": "Confusion of the leader at the fewest labels, over all subsets",
    "worst_mistakes": "The leader's most confident mistakes with all labels (linear probe)",
    "curves": "Training losses (the losses of different arms are not comparable)",
    "reconstructions": "Reconstructions of the masked autoencoder",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
img { max-width: 100%; }
code { background: #f3f3f3; padding: 0 .2rem; }
@media (prefers-color-scheme: dark) {
  body { background: #1c1c1c; color: #ddd; } code { background: #333; } img { background: #fff; }
}
"""


def page_of(
    params: Params,
    data: LabelledImages,
    arms: list[ArmOutcomes],
    verdict: Verdict,
    results: pd.DataFrame,
    folders: Mapping[str, Path],
    drawn: Sequence[str],
) -> str:
    """Write the page.

    Args:
        params: the parameters that ran.
        data: images and labels.
        arms: outcomes of all arms.
        verdict: of `judge`; its first line is the first of the page.
        results: the table of `results_table`.
        folders: arm → folder of its pre-training.
        drawn: the pictures that were drawn, of `PICTURES`.
    """
    plain, _ = plain_and_added([{str(k): str(v) for k, v in row.items()} for row in results.to_dict("records")])
    header, rows = wide_rows(plain)
    first, *others = verdict.lines
    lines = [f"# {TITLE}", "", *_paragraph(f"**{first}**"), ""]
    lines += [line for note in others for line in (*_paragraph(note), "")]
    if drawn:
        lines += _picture(drawn[0])
    lines += [*_paragraph(_setting(params, data)), ""]
    lines += _paragraph(
        "Top-1 accuracy on test in percent, with its 95 % interval. The interval is over test images and subsets of "
        "labels together. Where there is one subset (k-NN, the linear probe) it is Wilson's. It covers one "
        f"pre-training of each arm. {_knn_variant(arms)}"
    )
    lines += ["", *_table(header, rows), *_added(verdict.gains), *_comparison(verdict.pairs), *_more_measures(arms)]
    leads = leader(arms)
    lines += [*(_probabilities(leads, params.seed) if leads else []), *_compute(folders), ""]
    if leads:
        lines += [f"The leader of the pictures (best validation accuracy at the fewest labels) is {leads.arm}.", ""]
    for name in drawn[1:]:
        lines += _picture(name)
    return "\n".join(lines)


def _picture(name: str) -> list[str]:
    return [f"**{PICTURES[name]}**", "", f"![{name.replace('_', ' ')}](figures/{name}.png)", ""]


def _added(found: list[Gain]) -> list[str]:
    if not found:
        return []
    lines = ["", "## What unlabelled images and chosen images add", ""]
    lines += _paragraph(
        "Points that a method adds to logistic regression on random images, with the same encoder and as many labels, "
        "and their 95 % interval. Propagated: the labels spread to all training images over the graph of their "
        "features. Selected: the features choose which images are labelled, where the random images are balanced by "
        "class. Bold: p is below 0.05 after the correction for the comparisons of that row (Holm); the others are "
        "undecided."
    )
    methods = [method for method in COLUMNS if any(g.method == method for g in found)]
    if SEMI in methods:
        lines += _paragraph(
            "Semi-supervised: fine-tuning goes on with the unlabelled training images, compared with fine-tuning alone."
        )
    cells = {(g.arm, g.base, g.method): f"**{g.gap.signed()}**" if g.decided else g.gap.signed() for g in found}
    rows = dict.fromkeys((g.arm, g.base) for g in found)
    body = [[arm, task_name(base), *(cells.get((arm, base, method), "–") for method in methods)] for arm, base in rows]
    return [*lines, "", *_table(["arm", "labels", *methods], body)]


def _knn_variant(arms: list[ArmOutcomes]) -> str:
    """Name the variant of k-NN. Variants of one encoder differ by tens of points."""
    neighbours = {f"{a.tasks['linear'].metrics['knn_k']:.0f}" for a in arms}
    return (
        f"k-NN is of {' or '.join(sorted(neighbours))} neighbours, by the cosine of the features that `features` says: "
        "after the final norm, not standardised. Those of pixels are normalised pixels."
    )


def _comparison(pairs: list[Pair]) -> list[str]:
    if not pairs:
        return []
    lines = ["", "## Paired comparison", ""]
    lines += _paragraph(
        "Both arms of a row have the same subsets and test images. The interval is that of one comparison, over test "
        f"images and subsets together. The table makes {len(pairs)} comparisons, and some of them would seem decided "
        'by chance. So p is adjusted for all of them (Holm), and "beats" stands only where p is below 0.05: the chance '
        'that any "beats" of the table is false is at most 5 %. A row may be undecided although its own interval '
        "excludes a tie. The verdict needs only the leader's own intervals against the baselines, and all of them. All "
        "of this covers one pre-training of each arm. Another pre-training seed changes these numbers too."
    )
    rows = [
        [
            pair.sentence(pair.beats),
            task_name(pair.task),
            pair.interval(),
            "< 0.001" if pair.p < 0.001 else f"{pair.p:.3f}",
            f"{pair.gap.won} of {pair.gap.subsets}",
        ]
        for pair in pairs
    ]
    return [*lines, "", *_table(["", "labels", "95 % interval", "p (Holm)", "subsets won"], rows)]


def _more_measures(arms: list[ArmOutcomes]) -> list[str]:
    measures = ("top1", "top5", "ece")
    rows = [
        [a.arm, task_name(task), f"{m['subsets']:.0f}", *(_number(m.get(f"test/{measure}")) for measure in measures)]
        for a in arms
        for task, m in ((task, outcome.metrics) for task, outcome in a.tasks.items())
    ]
    head = ["", "## More measures", "", "On test: top-5 and expected calibration error (15 bins), percent.", ""]
    return head + _table(["arm", "task", "subsets", "top-1", "top-5", "calibration error"], rows)


def _probabilities(leads: ArmOutcomes, seed: int) -> list[str]:
    lines = ["", f"## How far the probabilities of {leads.arm} can be believed", ""]
    lines += _paragraph(
        "On test. The calibration error is in percent, before and after the logits are divided by the temperature. Its "
        "95 % interval is over test images. The Brier score is summed over classes: 0 is best, 2 worst. The last "
        "columns are the accuracy on the surest share of the images."
    )
    head = ["labels", "before", "after", "95 % interval", "Brier", *(f"surest {c} %" for c in COVERAGES)]
    rows = []
    for task, outcome in leads.tasks.items():
        m = outcome.metrics
        low, high = calibration_interval(*confidence_by_subset(outcome), seed)
        of_surest = [_number(m.get(f"test/top1_of_surest_{c}")) for c in COVERAGES]
        errors = [_number(m.get("test/ece_uncalibrated")), _number(m.get("test/ece")), f"[{low:.1f}, {high:.1f}]"]
        rows.append([task_name(task), *errors, f"{m.get('test/brier', math.nan):.3f}", *of_surest])
    return [*lines, "", *_table(head, rows)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _compute(folders: Mapping[str, Path]) -> list[str]:
    trainings = {arm: read_arm_metrics(folder) for arm, folder in folders.items()}
    pflop = {arm: m["train/pflop_total"] for arm, m in trainings.items() if "train/pflop_total" in m}
    said = "The work of pre-training, counted on the first step. It includes the arms that an arm started from."
    head = ["", "## Compute", "", said, ""]
    return head + _table(["arm", "work"], [[arm, flop_text(1e15 * value)] for arm, value in pflop.items()])


def _setting(params: Params, data: LabelledImages) -> str:
    model, size = params.model, data.image_size
    counts = ", ".join(f"{len(data.ids(split))} {split}" for split in ("train", "unlabeled", "val", "test"))
    return (
        f"`{said(params.data.source)}`: {counts} images of {size}×{size}×{data.channels} in {len(data.classes)} "
        f"classes. ViT of width {model.width}, depth {model.depth}, {model.heads} heads, patch {model.patch_size}; "
        f"seed {params.seed}."
    )


def _paragraph(text: str) -> list[str]:
    """Return the lines of a paragraph."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def to_html(markdown: str, title: str, folder: Path, live: Mapping[str, str] | None = None) -> str:
    """Render Markdown to one HTML file that contains its pictures.

    Args:
        markdown: with tables.
        title: of the window.
        folder: the pictures' paths are relative to it. Every picture exists.
        live: name of a picture → HTML in its place.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def inlined(found: re.Match[str]) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / found[1]).read_bytes()).decode()}"'

    for name, html in (live or {}).items():
        body = re.sub(rf'<p><img src="(?:[^"]*/)?{name}\.png"[^>]*></p>', lambda _: html, body)  # noqa: B023 - called at once
    body = re.sub(r'src="([^"]+\.png)"', inlined, body)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n'
