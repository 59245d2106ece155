"""A selection of images as files: a table that a person fills in, and a page that shows the images."""

import csv
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lgp.data.labels import LabelledImages
from lgp.data.sources.manifest import read_table
from lgp.errors import LgpError
from lgp.evaluate.selection import Selection
from lgp.report.thumbnails import figure, thumbnail_page


@dataclass(frozen=True)
class Origin:
    """What decided a selection: the method, its seed, the arm, and the digest of the arm's encoder."""

    method: str
    seed: int
    arm: str
    encoder: str


def check_unfilled(file: Path) -> None:
    """Raise `LgpError` unless a selection can be written to a file: a CSV that does not exist, or has no label yet."""
    if file.suffix != ".csv":
        raise LgpError(f"{file} is no name of a CSV: give --out a name that ends with .csv")
    if file.exists() and any(read_table(file).labels):
        raise LgpError(f"{file} has labels: `lgp labels add {file}` adds them, or give another file with --out")


def selection_table(selection: Selection, data: LabelledImages, origin: Origin) -> str:
    """Return the CSV that `lgp labels add` reads once its column `label` is filled in. Rows are in order of choice."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "cluster", "method", "seed", "arm", "encoder"])
    for image, cluster in zip(selection.images.tolist(), selection.clusters.tolist(), strict=True):
        writer.writerow([data.paths[image], "", cluster, origin.method, origin.seed, origin.arm, origin.encoder])
    return text.getvalue()


def selection_page(selection: Selection, data: LabelledImages, origin: Origin, table: Path) -> str:
    """Return an HTML page that shows the images, grouped by cluster. It works offline.

    Args:
        selection: the images.
        data: images and classes.
        origin: of the selection.
        table: the file of `selection_table`.
    """
    names = f"Classes so far: {', '.join(data.classes)}." if data.classes else "No image has a label yet."
    body = [
        f"<h1>{len(selection.images)} images to label</h1>",
        f"<p>Write their labels into <code>{escape(str(table))}</code>, then run <code>lgp labels add "
        f"{escape(str(table))}</code>. {escape(names)}</p>",
        f"<p>Method {origin.method}, seed {origin.seed}, arm {escape(origin.arm)}, encoder {origin.encoder}.</p>",
    ]
    for cluster in dict.fromkeys(selection.clusters.tolist()):
        images = selection.images[selection.clusters == cluster].tolist()
        figures = [figure(data.pixels(image), data.paths[image]) for image in images]
        body += [f"<h2>Cluster {cluster}</h2>", "<section>", *figures, "</section>"]
    return thumbnail_page("Images to label", body)
