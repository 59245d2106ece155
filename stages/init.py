"""Tool `init`: a project of the user's own, outside the tool's repository."""

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The project's folder; made if missing.")]
Preset = Annotated[str, typer.Option(help="The parameters to begin with: one of `lgp preset list`.")]
Git = Annotated[bool, typer.Option("--git", help="Make the folder a git repository too; `dvc exp` needs one.")]


def init(folder: Folder = Path(), preset: Preset = "digits", git: Git = False) -> None:
    """Make an empty folder a project: params.yaml, dvc.yaml, .dvc, .gitignore."""
    from lgp.workflow.project import init_project

    for line in init_project(folder, preset, git):
        print(line)
