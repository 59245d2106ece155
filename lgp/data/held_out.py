"""The images that are held out, drawn once and kept in `held_out.csv`, which belongs into version control.

An image is known by its pixels, so it keeps its part in another folder, file or format. Images and labels that come
later go to train, except images of a group that is held out. A file of other images, shares or of another seed does not
count: the parts are then drawn anew.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lgp.data.splits import hold_out
from lgp.errors import LgpError

PARTS = ("test", "val")
STRENGTH = (*PARTS, "train")
COLUMNS = ["image", "group", "part"]


@dataclass(frozen=True)
class Draw:
    """What the parts were drawn with."""

    seed: int
    test_share: float
    val_share: float

    def __str__(self) -> str:
        return f"# seed {self.seed}, test_share {self.test_share}, val_share {self.val_share}"


@dataclass(frozen=True)
class HeldOut:
    """Images and groups that are held out.

    Attributes:
        images: identity → part.
        groups: group → part.
    """

    draw: Draw
    images: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)

    def parts(self, identities: Sequence[str], groups: Sequence[str | None]) -> np.ndarray:
        """Return the part of each image, (N,): test, val or train.

        Images of one group, and images of equal pixels, are of one part: test, if one of them is, else val.
        """
        images, of_groups = dict(self.images), dict(self.groups)
        pairs = list(zip(identities, groups, strict=True))
        changed = True
        while changed:
            changed = False
            for identity, group in pairs:
                found = [images.get(identity, "train"), of_groups.get(group or "", "train")]
                part = min(found, key=STRENGTH.index)
                if part != "train" and found != [part, part]:
                    changed |= images.get(identity) != part or (group is not None and of_groups.get(group) != part)
                    images[identity] = part
                    if group is not None:
                        of_groups[group] = part
        return np.array([images.get(identity, "train") for identity in identities], dtype=object)

    def write(self, file: Path) -> None:
        """Write the file."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([image, "", part] for image, part in sorted(self.images.items()))
        writer.writerows(["", group, part] for group, part in sorted(self.groups.items()))
        file.write_text(f"{self.draw}\n{text.getvalue()}", encoding="utf-8")


def read_held_out(file: Path, draw: Draw) -> HeldOut | None:
    """Read the file. Return None if there is none, or if it was drawn otherwise.

    Raises:
        LgpError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        rows = list(csv.DictReader(lines))
        if not first.startswith("# seed "):
            raise ValueError("no file of held-out images")
        if first != str(draw):
            return None
        images = {row["image"]: row["part"] for row in rows if row["image"]}
        groups = {row["group"]: row["part"] for row in rows if row["group"]}
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        rows, images, groups = [{}], {}, {}
    if len(images) + len(groups) != len(rows) or not set(images.values()) | set(groups.values()) <= set(PARTS):
        raise LgpError(
            f"{file} is damaged: restore it (`git checkout {file}`); or remove it, and test and validation images are "
            "drawn anew"
        )
    return HeldOut(draw, images, groups)


def draw_held_out(
    before: HeldOut, identities: Sequence[str], labels: np.ndarray, groups: Sequence[str | None], given: np.ndarray
) -> HeldOut:
    """Draw the parts that neither the source gives nor the file has.

    Args:
        before: what is held out already. A share of 0 draws nothing.
        identities: of all images.
        labels: (N,) class indices, -1 where unlabelled.
        groups: of all images.
        given: (N,) train, val, test or dropped, as the source has them.
    """
    held_out = np.where(given == "train", before.parts(identities, groups), given)
    parts, draw = held_out.copy(), before.draw
    for part, share in (("test", draw.test_share), ("val", draw.val_share)):
        if share and not (parts == part).any():
            rows = np.flatnonzero(parts == "train").tolist()
            chosen = hold_out(
                labels[rows], [identities[i] for i in rows], [groups[i] for i in rows], share, draw.seed, part
            )
            parts[np.array(rows, dtype=np.int64)[chosen]] = part
    drawn = np.flatnonzero(parts != held_out).tolist()
    images = {identities[i]: str(parts[i]) for i in drawn}
    of_groups = {str(groups[i]): str(parts[i]) for i in drawn if groups[i] is not None}
    return HeldOut(draw, before.images | images, before.groups | of_groups)
