"""What the command line prints of names that no terminal shows."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from cli import app
from lgp.data.splits import few_names


@pytest.mark.parametrize(("name", "shown"), [("a\x1b[31m.pth", r"a\x1b[31m.pth"), ("\udcff.pth", r"\udcff.pth")])
def test_error_is_one_line_of_letters(name: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["import", name, "--arm", "x"])
    assert result.exit_code == 1
    assert result.output.startswith(
        f"error: no file {shown}: give a checkpoint (.pth, .pth.tar, .pt or .safetensors), "
    )
    assert result.output.count("\n") == 1


def test_output_in_letters_that_the_terminal_lacks_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii", errors="strict"))
    with pytest.raises(SystemExit):
        app(["--version"])
    print("16×16 \udcff")
    sys.stdout.flush()
    assert terminal.getvalue().endswith(b"16\\xd716 \\udcff\n")


def test_help_is_printed_in_every_locale(tmp_path: Path) -> None:
    surroundings = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "cli.py"), "export", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=surroundings, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_names_of_classes_stay_on_one_line() -> None:
    assert few_names(["two\nlines", "\x1b[31m", "日本"]) == r"two\nlines, \x1b[31m, 日本"
