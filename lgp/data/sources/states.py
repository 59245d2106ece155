"""The state of the sources: what the stages `prepare` and `labels` depend on, as digests that DVC compares.

The stage `inputs` computes them with every `dvc repro`, so this module imports little.
"""

import os
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from lgp.data.sources.offers import Offers

if TYPE_CHECKING:
    from lgp.data.sources.specs import Source

TIME, DIGEST = "time", "digest"
STATE = "source_state"  # the file in the results of a stage that has the state that they were made from


def list_file(path: Path) -> Path:
    """Return the path of a list. A relative path starts at the project, also if an experiment runs in a copy of it."""
    # not Path.expanduser: it raises for a ~ that names no user
    return Path(os.environ.get("DVC_ROOT", ".")) / os.path.expanduser(path)


def can_hold_out(offers: Offers) -> bool:
    """Return whether some class has two labelled images of train, so that one can be held out."""
    pairs = zip(offers.splits, offers.labels, strict=True)
    counts = Counter(label for split, label in pairs if split == "train" and label is not None)
    return any(count > 1 for count in counts.values())


def images_state(offers: Offers, noticed_by: str = TIME, sources: Sequence["Source"] = ()) -> str:
    """Return a digest of what `prepare` depends on: each image's name, split, group and state, and if any is labelled.

    A label that comes or changes leaves it as it is, except the first of a split, and the second of a class, from
    which on images can be held out.

    Args:
        offers: the source.
        noticed_by: `time`, or `digest` for the content of files. The state then begins with that word.
        sources: the key `data.source`, whose files are read for `digest`.
    """
    states, start = offers.states, ""
    if noticed_by == DIGEST:
        from lgp.data.sources.contents import by_contents

        states, start = by_contents(offers, sources), f"{DIGEST} "
    pairs = zip(offers.splits, offers.labels, strict=True)
    labelled = sorted({split for split, label in pairs if label is not None})
    state = sha256(f"labelled: {labelled}, can be held out: {can_hold_out(offers)}".encode())
    for row in zip(offers.paths, offers.splits, offers.groups, states, strict=True):
        state.update(f"{row}\n".encode())
    return start + state.hexdigest()


def is_state(noted: str, offers: Offers, sources: Sequence["Source"]) -> bool:
    """Return whether a state that `images_state` gave is that of the images now, looked at in the same way."""
    return noted == images_state(offers, DIGEST if noted.startswith(DIGEST) else TIME, sources)


def labels_state(offers: Offers) -> str:
    """Return a digest of what `labels` depends on: the classes, and each image's name, label, split and group."""
    state = sha256("\n".join(map(repr, offers.classes)).encode())
    for row in zip(offers.paths, offers.labels, offers.splits, offers.groups, strict=True):
        state.update(f"{row}\n".encode())
    return state.hexdigest()


def labelling_state(offers: Offers, lists: Sequence[str]) -> str:
    """Return a digest of the current origin of the labels: the label of each image, and the content of the lists."""
    state = sha256(labels_state(offers).encode())
    for name in lists:
        file = list_file(Path(name))
        state.update(f"{name}\n".encode() + (file.read_bytes() if file.is_file() else b""))
    return state.hexdigest()
