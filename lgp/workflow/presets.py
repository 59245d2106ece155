"""Whole parameter files by name."""

import os
import shutil
from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Any

from lgp.errors import LgpError
from lgp.params.editing import write_values
from lgp.workflow.source_tree import source_root

FOLDER = source_root() / "presets"


def names() -> dict[str, str]:
    """Return preset → the first comment line of its file."""
    return {p.stem: p.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for p in sorted(FOLDER.glob("*.yaml"))}


def use(name: str, target: Path, force: bool) -> None:
    """Copy a preset over the parameter file.

    Raises:
        LgpError: there is no such preset, or `target` has edits (it equals no preset) and `force` is not set.
    """
    source = FOLDER / f"{name}.yaml"
    if not source.exists():
        raise LgpError(f"no preset {name!r}: there are {', '.join(names())}")
    text = source.read_text(encoding="utf-8")
    if (
        target.exists()
        and not force
        and target.read_text(encoding="utf-8") not in {p.read_text(encoding="utf-8") for p in FOLDER.glob("*.yaml")}
    ):
        raise LgpError(f"{target} has edits that no preset holds: keep a copy, then add --force to overwrite them")
    target.write_text(text, encoding="utf-8")


def adopt(name: str, target: Path, values: Mapping[str, Any]) -> Path:
    """Replace the parameter file by a preset with other values, given as `section.key`.

    Returns:
        Where the old file is kept: beside it, as `params.yaml.before`, or with a number where that exists.

    Raises:
        LgpError: the values do not fit the preset. The old file then stays.
    """
    draft = target.with_name(f"{target.name}.new")
    shutil.copyfile(FOLDER / f"{name}.yaml", draft)
    try:
        write_values(draft, values)
        kept = _free(target.with_name(f"{target.name}.before"))
        shutil.copyfile(target, kept)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return kept


def _free(path: Path) -> Path:
    """Return a path that does not exist: this one, or with a number."""
    names = chain([path.name], (f"{path.name}{number}" for number in count(2)))
    return next(free for free in map(path.with_name, names) if not free.exists())
