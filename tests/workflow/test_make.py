"""`make` in a folder that was moved: it says what to do."""

import shutil
import subprocess
from pathlib import Path

from conftest import ROOT


def make(folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["make", "format", "BIN=true "], cwd=folder, capture_output=True, text=True, check=False)


def test_environment_of_another_folder_is_said_before_anything_fails(tmp_path: Path) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    ready = tmp_path / ".venv" / ".ready"
    ready.parent.mkdir()
    ready.write_text(f"{tmp_path}\n")
    assert make(tmp_path).returncode == 0
    moved = tmp_path.rename(tmp_path.with_name("moved folder"))
    refused = make(moved)
    assert refused.returncode == 2
    assert f"moved or copied from {tmp_path}, where .venv points: rm -rf .venv, then run make again" in refused.stdout
