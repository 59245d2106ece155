"""The images that are held out, drawn once and kept in `held_out.csv`, which belongs into version control.

An image is known by its pixels, so it keeps its part in another folder, file or format. Images and labels that come
later go to train, except images of a group that is held out. A file of other images, shares or of another seed does not
count: the parts are then drawn anew.

Its path is kept for one purpose: where `data.max_train_images` leaves images out, those that are held out are found
before anything is decoded. The file also says if the validation part of the source stood for the test part.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lgp.data.splits import hold_out
from lgp.errors import LgpError

PARTS = ("test", "val")
STRENGTH = (*PARTS, "train")
COLUMNS = ["image", "group", "part", "path"]
VAL_IS_TEST = "# val of the source stands for test"


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
        paths: identity → path, as the source had it when the parts were drawn, or when it was last found.
        val_is_test: whether the validation part that the source gives stood for the test part.
    """

    draw: Draw
    images: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    val_is_test: bool = False

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

    def found(self, identities: Sequence[str], paths: Sequence[str], offered: Sequence[str]) -> "HeldOut":
        """Return the same with a path for each image that was found.

        Args:
            identities: of the images that were found.
            paths: of these.
            offered: all paths of the source. A path that is kept and still among them stays.
        """
        there = set(offered)
        missing = {image for image in self.images if self.paths.get(image) not in there}
        # the first of equal images, which come last here
        now = {i: path for i, path in reversed(list(zip(identities, paths, strict=True))) if i in missing}
        return replace(self, paths=self.paths | now)

    def holds(self, paths: Sequence[str], groups: Sequence[str | None]) -> np.ndarray:
        """Return which images are held out by their path or group, (N,) bool. No pixels are needed for it."""
        kept = set(self.paths.values())
        pairs = zip(paths, groups, strict=True)
        return np.array([path in kept or group in self.groups for path, group in pairs], dtype=bool)

    def write(self, file: Path) -> None:
        """Write the file."""
        with file.open("w", encoding="utf-8", newline="") as text:
            text.write(f"{self.draw}\n" + (f"{VAL_IS_TEST}\n" if self.val_is_test else ""))
            # quotes, as a name may hold any end of a line
            writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writerow(COLUMNS)
            writer.writerows([i, "", part, self.paths.get(i, "")] for i, part in sorted(self.images.items()))
            writer.writerows(["", group, part, ""] for group, part in sorted(self.groups.items()))


def read_held_out(file: Path, draw: Draw) -> HeldOut | None:
    """Read the file. Return None if there is none, or if it was drawn otherwise.

    Raises:
        LgpError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        with file.open(encoding="utf-8", newline="") as text:
            first, _, rest = text.read().partition("\n")
        first, val_is_test = first.rstrip("\r"), rest.startswith(VAL_IS_TEST)
        rows = list(csv.DictReader(io.StringIO(rest.partition("\n")[2] if val_is_test else rest, newline="")))
        if not first.startswith("# seed "):
            raise ValueError("no file of held-out images")
        if first != str(draw):
            return None
        images = {row["image"]: row["part"] for row in rows if row["image"]}
        groups = {row["group"]: row["part"] for row in rows if row["group"]}
        paths = {row["image"]: row["path"] for row in rows if row["image"] and row.get("path")}
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        rows, images, groups = [{}], {}, {}
    if len(images) + len(groups) != len(rows) or not set(images.values()) | set(groups.values()) <= set(PARTS):
        raise LgpError(
            f"{file} is damaged: restore it (`git checkout {file}`); or remove it, and test and validation images are "
            "drawn anew"
        )
    return HeldOut(draw, images, groups, paths, val_is_test)


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
    return replace(before, images=before.images | images, groups=before.groups | of_groups)
