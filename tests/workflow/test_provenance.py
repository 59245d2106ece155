"""Provenance: the commit is that of the code, not of the project that uses it."""

import subprocess
from pathlib import Path

from conftest import ROOT

from lgp.workflow.provenance import git_state
from lgp.workflow.source_tree import is_checkout, source_root


def test_commit_of_a_checkout_is_its_own() -> None:
    assert source_root() == ROOT
    assert is_checkout(ROOT)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert git_state(ROOT)["commit"] == (head or "unknown")


def test_installed_package_does_not_take_the_commit_of_the_project_around_it(tmp_path: Path) -> None:
    package = tmp_path / ".venv" / "lgp" / "command"
    package.mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], cwd=tmp_path, check=True)
    assert git_state(package) == {"commit": "unknown", "dirty": False}
