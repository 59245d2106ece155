"""Labels that arrive later: a table of labels is checked against the images, and added to the project's own."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lgp.data.sources.manifest import SHOWN, label_offers, read_rows, read_table, table_of
from lgp.data.sources.offers import Columns, Offers
from lgp.data.sources.states import can_hold_out
from lgp.errors import LgpError

LABELS_FILE = "added_labels.csv"  # the project's own: no name that a user's table has


@dataclass(frozen=True)
class Added:
    """What a table of labels changes.

    Attributes:
        new: number of images that had no label.
        changed: number of images whose label is now another.
        same: number of images that had this label.
        empty: number of rows without a label.
        counts: class → number of its labelled images afterwards.
        first: whether images can be held out only now.
        labels: path → label of the images that the table labels.
    """

    new: int
    changed: int
    same: int
    empty: int
    counts: dict[str, int]
    first: bool
    labels: dict[str, str]

    def said(self) -> list[str]:
        """Return it as text, a line each."""
        lines = [
            f"{self.new} new labels, {self.changed} changed, {self.same} as before, {self.empty} rows without a label"
        ]
        lines += [f"{name}: {count} labelled images" for name, count in self.counts.items()]
        return lines


def added_labels(offers: Offers, file: Path, columns: Columns) -> Added:
    """Check a table of labels against the images. Nothing is written.

    Raises:
        LgpError: the table cannot be read, a row names no image or several, or no row has a label.
    """
    rows = read_rows(file)
    table = table_of(rows, rows.known(columns))
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
    before = [offers.labels[i] for i in dict.fromkeys(labelled)]
    now = {i: str(after.labels[i]) for i in dict.fromkeys(labelled)}
    same = sum(old == new for old, new in zip(before, now.values(), strict=True))
    counts = Counter(label for label in after.labels if label is not None)
    return Added(
        new=before.count(None),
        changed=len(now) - same - before.count(None),
        same=same,
        empty=len(table.paths) - len(labelled),
        counts={name: counts[name] for name in after.classes if counts[name]},
        first=can_hold_out(after) and not can_hold_out(offers),
        labels={offers.paths[i]: label for i, label in now.items()},
    )


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
    """Return what `dvc repro` runs again after labels were added."""
    if first:
        return (
            "these are the first labels: test and validation images are held out now, so images, encoders of "
            f"{', '.join(arms)} and evaluations are made anew"
        )
    return "labels, evaluations and report run again; images and encoders stay"
