"""A project of the user's own: the files that `dvc repro` needs, in a folder outside the tool's repository."""

import shutil
import subprocess
import sys
from pathlib import Path

from lgp.errors import LgpError
from lgp.workflow.presets import use
from lgp.workflow.source_tree import source_root

PIPELINE = ("dvc.yaml", "controls/dvc.yaml", ".dvcignore")
IGNORED = """# written by the pipeline; DVC keeps what belongs together
/inputs/
/data/
/models/
/predictions/
/reports/champion.json
/reports/inspect.jpg
/reports/report.html
.partial.*
/.lgp/
/.venv/
/mlflow.db*
/mlartifacts/
/mlruns/
dvc_plots/
# checkpoints to import, as others publish them: too large for git
*.pth
*.pth.tar
*.pt
*.safetensors
"""


def init_project(folder: Path, preset: str, git: bool) -> list[str]:
    """Write a project's files into a folder, and make it a DVC repository.

    Args:
        folder: made if missing. It must contain neither a project nor a DVC repository.
        preset: the parameters to begin with.
        git: also make it a git repository, unless it is inside one.

    Returns:
        Lines that say what was done and what to do next.

    Raises:
        LgpError: a file to write exists already, there is no such preset, or git or DVC fails.
    """
    targets = ("params.yaml", ".dvc", *PIPELINE)
    there = [name for name in targets if (folder / name).exists()]
    if there:
        raise LgpError(f"{folder.resolve()} has {', '.join(there)} already: choose an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    use(preset, folder / "params.yaml", force=False)
    for name in PIPELINE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source_root() / name, folder / name)
    ignore = folder / ".gitignore"
    before = ignore.read_text(encoding="utf-8") if ignore.exists() else ""
    ignore.write_text(before + IGNORED, encoding="utf-8")
    if git and not _in_git(folder):
        _run(["git", "init", "--quiet"], folder)
    dvc = [sys.executable, "-m", "dvc"]
    _run([*dvc, "init", "--quiet", *_scm_option(folder)], folder)
    for key in ("core.analytics", "core.autostage"):
        _run([*dvc, "config", key, "false"], folder)
    lines = [f"{folder.resolve()} is a project now, with the parameters of the preset {preset}"]
    if not _in_git(folder):
        lines.append("it is not in git: `dvc repro` works, `dvc exp` needs `lgp init --git`")
    else:
        lines.append("its files are not committed yet: `git add -A && git commit`, which `dvc exp` needs")
    return [*lines, "next: `lgp repro`; for images of your own first `lgp data inspect PATH --write` with their path"]


def _scm_option(folder: Path) -> list[str]:
    """Return the option of `dvc init`: the folder is in no git repository, at the top of one, or below its top."""
    top = _git_top(folder)
    if top is None:
        return ["--no-scm"]
    return [] if top == folder.resolve() else ["--subdir"]


def _in_git(folder: Path) -> bool:
    return _git_top(folder) is not None


def _git_top(folder: Path) -> Path | None:
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "--show-toplevel"],
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
        )
    except OSError:
        return None
    return Path(asked.stdout.strip()).resolve() if asked.returncode == 0 else None


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, capture_output=True, check=True, encoding="utf-8", errors="surrogateescape")
    except OSError as e:
        raise LgpError(f"{command[0]} cannot be run ({e.strerror}): install it") from None
    except subprocess.CalledProcessError as e:
        said = " ".join((e.stderr or e.stdout).split())[-300:]
        raise LgpError(f"`{' '.join(command)}` failed in {folder.resolve()}: {said}") from None
