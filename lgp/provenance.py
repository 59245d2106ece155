"""Digests of what went into a result: parameters, input files, code, commit."""

import ast
import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lgp.params import Params, section_values

# what surrounds a stage: shows, draws, records or checks a run without a say in its numbers. An edit there must
# not train for days again, so no stage depends on it.
SURROUNDINGS = (
    "lgp/online.py",
    "lgp/progress.py",
    "lgp/provenance.py",
    "lgp/registered_encoder.py",
    "lgp/stage.py",
    "lgp/tracking.py",
    "stages/options.py",
)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_digest(path: Path) -> str:
    """Digest an input: a file, or a folder by all its files; prepared data by the digest it carries."""
    if path.is_file():
        return file_digest(path)
    meta = path / "meta.json"
    if meta.exists():
        return str(json.loads(meta.read_text())["digest"])
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path)} {file_digest(file)}\n".encode())
    return whole.hexdigest()


def params_digest(params: Params, sections: Iterable[str]) -> str:
    """Digest the sections of the parameters that a stage reads."""
    return hashlib.sha256(json.dumps(section_values(params, sections), sort_keys=True).encode()).hexdigest()


def modules_used(entry: Path, root: Path) -> list[Path]:
    """List the project's modules that `entry` imports, directly or not, itself included.

    Read from the source without running it; imports inside functions count, `SURROUNDINGS` do not.

    Args:
        entry: a Python file, relative to `root`.
        root: the checkout.

    Returns:
        Paths relative to `root`, sorted.
    """
    found: set[Path] = set()
    pending = [entry]
    while pending:
        path = pending.pop()
        if path in found or path.as_posix() in SURROUNDINGS:
            continue
        found.add(path)
        pending += [m for name in _imported(root / path) for m in _module_files(name, root)]
    return sorted(found)


def _imported(path: Path) -> Iterable[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_files(name: str, root: Path) -> list[Path]:
    """Files that importing `name` runs; a package's `__init__` holds a docstring only and does not count."""
    if name.split(".")[0] not in ("lgp", "stages"):
        return []
    path = Path(*name.split(".")).with_suffix(".py")
    return [path] if (root / path).is_file() else []


def code_digest(entry: Path, root: Path) -> str:
    """Digest the source of all modules that `entry` uses."""
    whole = hashlib.sha256()
    for path in modules_used(entry, root):
        whole.update(f"{path.as_posix()} {file_digest(root / path)}\n".encode())
    return whole.hexdigest()


def git_state(root: Path) -> dict[str, Any]:
    """Return commit (or `unknown`) and whether the code differs from it (results that a run rewrites do not count)."""

    def git(*args: str) -> str | None:
        try:
            result = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {"commit": commit or "unknown", "dirty": bool(git("status", "--porcelain", "--", "lgp", "stages", "cli.py"))}
