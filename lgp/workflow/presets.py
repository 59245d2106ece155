"""Whole parameter files by name."""

from pathlib import Path

from lgp.errors import LgpError
from lgp.workflow.source_tree import source_root

FOLDER = source_root() / "presets"


def names() -> dict[str, str]:
    """Return preset → the first comment line of its file."""
    return {p.stem: p.read_text().splitlines()[0].lstrip("# ") for p in sorted(FOLDER.glob("*.yaml"))}


def use(name: str, target: Path, force: bool) -> None:
    """Copy a preset over the parameter file.

    Raises:
        LgpError: there is no such preset, or `target` has edits (it equals no preset) and `force` is not set.
    """
    source = FOLDER / f"{name}.yaml"
    if not source.exists():
        raise LgpError(f"no preset {name!r}: there are {', '.join(names())}")
    text = source.read_text()
    if target.exists() and not force and target.read_text() not in {p.read_text() for p in FOLDER.glob("*.yaml")}:
        raise LgpError(f"{target} has edits that no preset holds: keep a copy, then add --force to overwrite them")
    target.write_text(text)
