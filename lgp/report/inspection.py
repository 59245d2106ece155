"""What `lgp data inspect` prints of a data source."""

from collections import Counter
from collections.abc import Mapping, Sequence

from lgp.compute.units import time_text
from lgp.data.inspection import Inspection, Sample, Spread
from lgp.data.sources.offers import Skipped
from lgp.report.terminal import print_table

CLASSES, FILES = 20, 5  # that are listed


def print_inspection(inspection: Inspection) -> None:
    """Print counts, the sample, and what was left out."""
    print(inspection.offered)
    for kind, found in (("skipped", inspection.skipped), ("no image", inspection.clutter)):
        _print_reasons(kind, found)
    if not inspection.images:
        return
    parts = [[part, f"{inspection.splits[part]:,}", f"{inspection.parts[part]:,}"] for part in inspection.parts]
    print_table("Parts", ("part", "in the source", "once held out"), parts)
    print_table("Classes", ("class", "labelled images", "of them to train"), class_rows(inspection))
    if inspection.groups:
        print(f"{inspection.grouped:,} images are in {inspection.groups:,} groups")
    of = "all images" if inspection.sample.images == inspection.images else f"of {inspection.images:,}, evenly spaced"
    print_table(
        f"Sample: {inspection.sample.images:,} images decoded ({of})", ("what", "found"), sample_rows(inspection.sample)
    )
    _print_reasons("unreadable", inspection.sample.unreadable)


def class_rows(inspection: Inspection) -> list[list[str]]:
    """Return the classes, the largest first, and the images without a label."""
    classes = sorted(inspection.classes.items(), key=lambda pair: -pair[1])
    rows = [[name, f"{count:,}", f"{inspection.train_labels.get(name, 0):,}"] for name, count in classes[:CLASSES]]
    others = classes[CLASSES:]
    if others:
        to_train = sum(inspection.train_labels.get(name, 0) for name, _ in others)
        rows.append([f"({len(others):,} more classes)", f"{sum(count for _, count in others):,}", f"{to_train:,}"])
    return [*rows, ["(without a label)", f"{inspection.unlabelled:,}", ""]]


def sample_rows(sample: Sample) -> list[list[str]]:
    """Return what the decoded images are."""
    copies = sum(len(same) - 1 for same in sample.copies)
    return [
        ["formats", _counted(sample.formats)],
        ["modes", _counted(sample.modes)],
        ["shorter side, pixels", _spread(sample.short_side)],
        ["longer by shorter side", _spread(sample.aspect)],
        ["channels", f"{sample.channels}; {sample.grey_in_colour:,} images stored in colour are grey"],
        ["with transparency", f"{sample.transparent:,}"],
        ["mean", ", ".join(f"{m:.3f}" for m in sample.mean)],
        ["standard deviation", ", ".join(f"{s:.3f}" for s in sample.std)],
        ["copies of other images", f"{copies:,}; {len(sample.contradictions):,} images stand under several labels"],
        ["unreadable", f"{len(sample.unreadable):,}"],
    ]


def expected_line(minutes: Mapping[str, float]) -> str:
    """Return the expected time, and what it is made of."""
    parts = ", ".join(f"{name} {time_text(part / 60)}" for name, part in minutes.items() if part)
    whole = time_text(sum(minutes.values()) / 60)
    return f"`dvc repro` takes about {whole} on this machine, `lgp repro` less where cores are idle: {parts}"


def _print_reasons(kind: str, found: Sequence[Skipped]) -> None:
    """Print how many were left out for which reason, with some names."""
    for reason, count in Counter(skip.reason for skip in found).most_common():
        names = [skip.path for skip in found if skip.reason == reason]
        print(f"{kind}: {count:,} × {reason}: {', '.join(names[:FILES])}{', …' if count > FILES else ''}")


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in numbers.items())


def _spread(spread: Spread) -> str:
    return f"{spread.least:.4g} to {spread.most:.4g}, median {spread.median:.4g}"
