"""Text is written and read as UTF-8, whatever the locale says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = [ROOT / "cli.py", *(ROOT / "lgp").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]
OPENING = {"open", "fdopen", "read_text", "write_text", "TextIOWrapper", "NamedTemporaryFile"}
OF_BYTES = {"tarfile", "zipfile", "archive", "os", "Image", "fs", "timm", "pa", "ipc", "webbrowser"}  # others' `open`


def calls_without_encoding(code: str) -> Iterator[int]:
    """Yield the lines of calls that open text in the encoding of the locale."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in {"run", "Popen", "check_output"} and "text" in keywords and "encoding" not in keywords:
            yield node.lineno
        if name in OPENING and "encoding" not in keywords and not _of_bytes(node, keywords):
            yield node.lineno


def _of_bytes(node: ast.Call, keywords: dict[str | None, ast.expr]) -> bool:
    """Return whether a call opens bytes: by its mode, or because what it is called on knows no text."""
    of = node.func.value if isinstance(node.func, ast.Attribute) else None
    owner = getattr(of, "id", getattr(of, "attr", ""))
    modes = [arg.value for arg in (*node.args, keywords.get("mode")) if isinstance(arg, ast.Constant)]
    return owner in OF_BYTES or any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_text_file_has_an_encoding(file: Path) -> None:
    assert list(calls_without_encoding(file.read_text(encoding="utf-8"))) == []


def test_calls_without_an_encoding_are_found() -> None:
    code = "open(p)\np.open('w')\np.read_text()\np.write_text(t)\nrun(c, text=True)\n"
    assert list(calls_without_encoding(code)) == [1, 2, 3, 4, 5]
    fine = (
        "open(p, 'rb')\np.open('wb')\np.read_text(encoding='utf-8')\nrun(c, text=True, encoding='utf-8')\nos.open(p)\n"
    )
    assert list(calls_without_encoding(fine)) == []
