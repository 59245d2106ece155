"""Labels that look wrong as files: a table that a person fills in, and a page that shows the images."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from lgp.data.labels import LabelledImages
from lgp.evaluate.audit import KINDS, PARTS, Finding
from lgp.report.thumbnails import figure, thumbnail_page

# no name that `lgp labels add` takes for the split or group of an image
COLUMNS = ("path", "label", "given", "suggested", "probability", "kind", "score", "other", "used_as", "arm", "encoder")
SHOWN = 500  # of a kind, on the page
HEADINGS = {
    "duplicate": "Duplicates with different labels",
    "label": "Labels that the model doubts",
    "outlier": "Images unlike all others",
}


def counted(findings: Sequence[Finding], data: LabelledImages) -> str:
    """Return in a sentence how many labels look wrong, and why."""
    labelled = sum(len(data.ids(part)) for part in PARTS)
    kinds = Counter(kind for found in findings for kind in found.kinds)
    reasons = f" ({', '.join(f'{kind} {kinds[kind]}' for kind in KINDS)})" if findings else ""
    return f"{len(findings)} of {labelled} labels look wrong{reasons}"


def audit_table(findings: Sequence[Finding], data: LabelledImages, arm: str, encoder: str) -> str:
    """Return the CSV that `lgp labels add` reads. Its column `label` is empty: a row that stays so changes no label.

    Args:
        findings: a row each, in this order.
        data: images and classes.
        arm: whose features were audited.
        encoder: digest of the arm's encoder.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for found in findings:
        suggested = "" if found.suggested is None else data.classes[found.suggested]
        probability = "" if found.probability is None else f"{found.probability:.4f}"
        other = "" if found.other is None else data.paths[found.other]
        given, kind = data.classes[data.labels[found.image]], "+".join(found.kinds)
        judged = [given, suggested, probability, kind, f"{found.score:.4f}", other, found.part]
        writer.writerow([data.paths[found.image], "", *judged, arm, encoder])
    return text.getvalue()


def audit_page(findings: Sequence[Finding], data: LabelledImages, arm: str, encoder: str, table: Path) -> str:
    """Return an HTML page that shows the images, grouped by the first kind. It works offline.

    Args:
        findings: in order.
        data: images and classes.
        arm: whose features were audited.
        encoder: digest of the arm's encoder.
        table: the file of `audit_table`.
    """
    name = escape(str(table))
    body = [
        f"<h1>{len(findings)} labels that look wrong</h1>",
        f"<p>Where one is wrong, write the right one into the column <code>label</code> of <code>{name}</code>. Then "
        f"run <code>lgp labels add {name}</code>. Rows that stay empty change nothing.</p>",
        f"<p>Arm {escape(arm)}, encoder {encoder}.</p>",
    ]
    for kind in KINDS:
        of_kind = [found for found in findings if found.kinds[0] == kind]
        if of_kind:
            shown = f", the first {SHOWN} shown" if len(of_kind) > SHOWN else ""
            figures = [_figures(found, data) for found in of_kind[:SHOWN]]
            body += [f"<h2>{HEADINGS[kind]} ({len(of_kind)}{shown})</h2>", "<section>", *figures, "</section>"]
    return thumbnail_page("Labels that look wrong", body)


def _figures(found: Finding, data: LabelledImages) -> str:
    """Return the image with what is said of it, and beside a duplicate the other image."""
    label, path = data.classes[data.labels[found.image]], data.paths[found.image]
    suggested = label if found.suggested is None else data.classes[found.suggested]
    doubt = "" if suggested == label else f", rather {suggested}"
    figures = [figure(data.pixels(found.image), f"{label}{doubt}: {path} ({found.part})")]
    if found.other is not None:
        other = f"as {data.classes[data.labels[found.other]]}: {data.paths[found.other]}"
        figures.append(figure(data.pixels(found.other), other))
    return "".join(figures)
