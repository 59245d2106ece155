"""The place of the source of `lgp`: a checkout, or an installed package.

It runs before every command, so it imports little.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def is_checkout(folder: Path) -> bool:
    """Return whether a folder is a checkout of this project, or a copy of one."""
    return all((folder / name).is_file() for name in ("cli.py", "lgp/__main__.py", "stages/__init__.py"))


def source_root() -> Path:
    """Return the folder that contains `cli.py`, `stages/`, `presets/` and `dvc.yaml`.

    It is the checkout, beside `lgp/`. An installed package has a copy of these below itself (see pyproject.toml).
    """
    return PACKAGE.parent if is_checkout(PACKAGE.parent) else PACKAGE / "command"
