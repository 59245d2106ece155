"""Digests of the origins of a result: parameters, inputs, commit. `lgp.workflow.code_digest` digests the code."""

import hashlib
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lgp.compute.digests import file_digest
from lgp.compute.intact import read_json
from lgp.params.file import Params, section_values
from lgp.workflow.source_tree import is_checkout


class Digested(BaseModel):
    """What `meta.json` of prepared images and of labels has."""

    digest: str


def input_digest(path: Path, remedy: str) -> str:
    """Digest an input: a file, or a folder by all its files.

    Prepared images and labels carry their digest in `meta.json`. Raise `Damaged` if that file is; `remedy` makes it
    anew.
    """
    if path.is_file():
        return file_digest(path)
    meta = path / "meta.json"
    if meta.exists():
        return str(read_json(meta, Digested, remedy)["digest"])
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path)} {file_digest(file)}\n".encode())
    return whole.hexdigest()


def params_digest(params: Params, sections: Iterable[str]) -> str:
    """Digest the sections of the parameters that a stage reads."""
    return hashlib.sha256(json.dumps(section_values(params, sections), sort_keys=True).encode()).hexdigest()


def git_state(root: Path) -> dict[str, Any]:
    """Return the commit of a checkout and whether its code differs from it; `unknown` for an installed package.

    Results that a run rewrites do not count. An installed package may lie below a repository of its user's.
    """
    if not is_checkout(root):
        return {"commit": "unknown", "dirty": False}

    def git(*args: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", *args], cwd=root, capture_output=True, check=True, encoding="utf-8", errors="surrogateescape"
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {"commit": commit or "unknown", "dirty": bool(git("status", "--porcelain", "--", "lgp", "stages", "cli.py"))}
