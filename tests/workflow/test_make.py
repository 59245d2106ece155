"""`make` in a folder that was moved, or that is no git repository: it says what to do."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT


def make(folder: Path, target: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["make", target, "BIN=true "], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    ready = tmp_path / ".venv" / ".ready"
    ready.parent.mkdir()
    ready.write_text(f"{tmp_path}\n")
    return tmp_path


def test_download_without_git_is_told_what_dvc_needs(checkout: Path) -> None:
    refused = make(checkout, "repro")
    assert refused.returncode == 2
    assert "DVC needs a git repository: in a ZIP download run git init" in refused.stdout
    subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
    assert make(checkout, "repro").returncode == 0


def test_environment_of_another_folder_is_said_before_anything_fails(checkout: Path) -> None:
    assert make(checkout, "format").returncode == 0
    moved = checkout.rename(checkout.with_name("moved folder"))
    refused = make(moved, "format")
    assert refused.returncode == 2
    assert f"moved or copied from {checkout}, where .venv points: rm -rf .venv, then run make again" in refused.stdout
