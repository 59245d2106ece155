"""Labels that arrive later: a table of labels is checked against the images, and added to the project's own."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lgp.data.label_notes import notes_on_names
from lgp.data.sources.manifest import SHOWN, label_offers, read_rows, read_table, table_of
from lgp.data.sources.offers import USUAL, Columns, Offers
from lgp.data.sources.states import can_hold_out
from lgp.data.splits import few_names
from lgp.errors import LgpError

LABELS_FILE = "added_labels.csv"  # the project's own: no name that a user's table has
NEAR = 0.75  # likeness of two names from which one may be meant for the other


@dataclass(frozen=True)
class Added:
    """What a table of labels changes.

    Attributes:
        new: number of images that had no label.
        changed: number of images whose label is now another.
        same: number of images that had this label.
        empty: number of rows without a label.
        kept: number of these whose image has a label, which stays.
        examples: some of the changed labels.
        classes: new class → the class before that has nearly its name, None without one. Empty for the first labels.
        gone: classes that lost their last label.
        counts: class → number of its labelled images afterwards.
        notes: what else is to be told of the table, and of the names of classes.
        first: whether images can be held out only now.
        labels: path → label of the images that the table labels.
    """

    new: int
    changed: int
    same: int
    empty: int
    kept: int
    examples: list[str]
    classes: dict[str, str | None]
    gone: list[str]
    counts: dict[str, int]
    notes: list[str]
    first: bool
    labels: dict[str, str]

    def said(self) -> list[str]:
        """Return it as text, a line each."""
        lines = [
            f"{self.new} new labels, {self.changed} changed, none removed, {self.same} as before, {self.empty} rows "
            "without a label"
        ]
        if self.kept:
            lines.append(
                f"{self.kept} rows without a label are of labelled images, which keep theirs: to remove a label, "
                f"remove it where it was given (a table, or {LABELS_FILE})"
            )
        if self.examples:
            lines.append(f"changed: {', '.join(self.examples)}{', …' if self.changed > len(self.examples) else ''}")
        if self.classes:
            names = [name + (f" (did you mean {near}?)" if near else "") for name, near in self.classes.items()]
            lines.append(f"new classes: {few_names(names)}")
        if self.gone:
            lines.append(f"classes without a label now: {few_names(self.gone)}")
        lines += [f"{name}: {count} labelled images" for name, count in self.counts.items()]
        return [*lines, *self.notes]


def added_labels(offers: Offers, file: Path, columns: Columns) -> Added:
    """Check a table of labels against the images. Nothing is written.

    Raises:
        LgpError: the table cannot be read, a row names no image or several, or no row has a label.
    """
    rows = read_rows(file)
    known = rows.known(columns)
    table = table_of(rows, known)
    if rows.column("label", known) is None:
        raise LgpError(
            f"{file} has the columns {', '.join(map(str, rows.header))}, none of them of labels: call one `label`, or "
            f"name it with data.columns: {{label: COLUMN}} (usual names are {', '.join(USUAL['label'])})"
        )
    if any(table.splits) or any(table.groups):
        raise LgpError(
            f"{file} has splits or groups, which `lgp labels add` does not take: remove these columns, or name the "
            "table in data.labels and run `lgp prepare`"
        )
    after, named = label_offers(offers, table)
    unknown = [table.said(row) for row, image in enumerate(named) if image is None]
    if unknown:
        raise LgpError(
            f"{file}: {len(unknown)} of {len(named)} rows name no image of data.source: {', '.join(unknown[:SHOWN])}: "
            "mend the paths, which start at the source's folder"
        )
    labelled = [i for i, label in zip(named, table.labels, strict=True) if i is not None and label is not None]
    if not labelled:
        raise LgpError(f"{file} labels no image: fill in its column of labels")
    now = {i: str(after.labels[i]) for i in dict.fromkeys(labelled)}
    before = {i: offers.labels[i] for i in now}
    new = [i for i in now if before[i] is None]
    changed = [i for i in now if before[i] not in (None, now[i])]
    left = {i for i in named if i is not None} - now.keys()
    counts, old = (Counter(label for label in of.labels if label is not None) for of in (after, offers))
    return Added(
        new=len(new),
        changed=len(changed),
        same=len(now) - len(new) - len(changed),
        empty=len(table.paths) - len(labelled),
        kept=sum(offers.labels[i] is not None for i in left),
        examples=[f"{offers.paths[i]} {before[i]} → {now[i]}" for i in changed[:SHOWN]],
        classes={name: _near(name, list(old)) for name in after.classes if old and counts[name] and not old[name]},
        gone=[name for name in old if not counts[name]],
        counts={name: counts[name] for name in after.classes if counts[name]},
        notes=[*table.notes, *notes_on_names(after.labels)],
        first=can_hold_out(after) and not can_hold_out(offers),
        labels={offers.paths[i]: label for i, label in now.items()},
    )


def _near(name: str, classes: Sequence[str]) -> str | None:
    """Return the class that has nearly this name, None without one. Numbers are near to none."""
    by_text = {other.casefold(): other for other in classes}
    close = [] if name.isdecimal() else get_close_matches(name.casefold(), list(by_text), n=1, cutoff=NEAR)
    return by_text[close[0]] if close else None


def write_labels_file(file: Path, labels: dict[str, str]) -> None:
    """Add labels to the project's own table, which need not exist. A later label of an image replaces an earlier."""
    before: dict[str, str] = {}
    if file.exists():
        table = read_table(file)
        pairs = zip(table.paths, table.labels, strict=True)
        before = {path: label for path, label in pairs if label is not None}
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    plain.writerow(["path", "label"])
    for row in (before | labels).items():
        (quoted if "\r" in row[0] else plain).writerow(row)  # csv takes a lone carriage return for an end of the line
    file.write_text(text.getvalue(), encoding="utf-8")


def rerun(arms: Sequence[str], first: bool) -> str:
    """Return what `lgp repro` runs again after labels were added."""
    if first:
        return (
            "these are the first labels: test and validation images are held out now, so images, encoders of "
            f"{', '.join(arms)} and evaluations are made anew"
        )
    return "labels, evaluations and report run again; images and encoders stay"
