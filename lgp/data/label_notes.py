"""What is to be told of labels that look like a mistake: words for "no label", spellings of one class, equal pixels.

Nothing is merged or removed: a class may be called so on purpose.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from lgp.data.splits import few_names

NO_LABEL = {
    *("na", "n/a", "n.a.", "nan", "null", "nil", "none", "unknown", "unk", "undefined", "missing", "tbd", "?", "??"),
    *("-", "--", "—", ".", "#n/a", "not available", "no label", "unlabeled", "unlabelled"),
}
SHOWN = 3


def notes_on_names(labels: Iterable[str | None]) -> list[str]:
    """Return what is to be told of the names of classes, a line for each kind of mistake.

    Args:
        labels: of all images, None without one.
    """
    counts = Counter(label for label in labels if label is not None)
    notes = []
    if words := [name for name in counts if name.strip().casefold() in NO_LABEL]:
        notes.append(
            f"warning: {few_names(_counted(words, counts))} reads like no label, and is a class: leave the label "
            "empty, or put such images of a folder into `unlabeled/`"
        )
    spelt: dict[str, list[str]] = {}
    for name in sorted(counts):
        spelt.setdefault(_without_case_and_blanks(name), []).append(name)
    if several := [names for names in spelt.values() if len(names) > 1]:
        said = "; ".join(" and ".join(_counted(names, counts)) for names in several[:SHOWN])
        more = f"; and {len(several) - SHOWN} more" if len(several) > SHOWN else ""
        notes.append(
            f"warning: classes differ only in case, blanks or underscores, and count as several: {said}{more}: write "
            "each in one way if it is one class"
        )
    return notes


def notes_on_equal_pixels(contents: Sequence[bytes], labels: Sequence[int], paths: Sequence[str]) -> list[str]:
    """Return a line if images of the same pixels have several labels.

    Args:
        contents: the digest of the pixels of each image.
        labels: class indices, -1 where unlabelled.
        paths: names of the images.
    """
    places: dict[bytes, list[int]] = {}
    for place, content in enumerate(contents):
        if labels[place] >= 0:
            places.setdefault(content, []).append(place)
    found = [same for same in places.values() if len({labels[i] for i in same}) > 1]
    if not found:
        return []
    first = found[0][0]
    other = next(i for i in found[0] if labels[i] != labels[first])
    return [
        f"warning: {sum(map(len, found))} images have the same pixels as another and another label, as {paths[first]} "
        f"and {paths[other]}: correct the labels, or leave those empty that nobody knows"
    ]


def _counted(names: Sequence[str], counts: Counter[str]) -> list[str]:
    """Return names with their numbers of images, as `'cat' (3 images)`."""
    return [f"{name!r} ({counts[name]} image{'s' if counts[name] > 1 else ''})" for name in names]


def _without_case_and_blanks(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())
