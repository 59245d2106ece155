"""Seals: a folder that a stage leaves for others has the digests of its files. They are compared when it is opened.

The seal is the file `digests.json`: name of a file → size in bytes and SHA-256. A name that starts with `../` is of a
file beside the folder. A folder without a seal is of an older version, and is taken as it is.

A large file is digested once per content: a note in `.lgp/checked` says that it is intact. The note holds while the
file keeps size, times of change and inode.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel

from lgp.compute.digests import file_digest
from lgp.compute.intact import Damaged, read_json

SEAL = "digests.json"
CHECKED = Path(".lgp") / "checked"
NOTED_FROM = 2**20  # bytes: smaller files are digested whenever they are opened
SETTLED_NS = 10**9  # a file that changed less long ago may change again without another time
GIB = 2**30
TOLD_FROM = 4 * GIB  # to digest


class Sealed(BaseModel):
    """What a seal has of a file: its size, and the SHA-256 of its content."""

    bytes: int
    sha256: str


def seal(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write the seal of a folder, or add files to it.

    Args:
        folder: existing.
        names: of the files, relative to the folder. None: all in the folder.
    """
    file = folder / SEAL
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    chosen = sorted(names or (f.name for f in folder.iterdir() if f.is_file() and f.name != SEAL))
    files = [_file(folder, name) for name in chosen]
    now = {
        name: {"bytes": of_name.stat().st_size, "sha256": digest}
        for name, of_name, digest in zip(chosen, files, _digests(files), strict=True)
    }
    file.write_text(json.dumps(before | now, indent=2) + "\n", encoding="utf-8")


def check_sealed(folder: Path, remedy: str, names: Sequence[str] | None = None) -> None:
    """Raise `Damaged` unless the files of a folder are as they were sealed. Without a seal nothing is checked.

    Args:
        folder: that may have a seal.
        remedy: what makes the folder anew.
        names: the files to check, as far as the seal has them. None: all that lie in the folder.
    """
    if not (folder / SEAL).exists():
        return
    sealed = read_json(folder / SEAL, dict[str, Sealed], remedy)
    if not sealed:
        raise Damaged(folder / SEAL, "it names no file", remedy)
    chosen = [name for name in sealed if not name.startswith("../")] if names is None else names
    expected = {_file(folder, name): sealed[name] for name in chosen if name in sealed}
    for file, of_file in expected.items():
        _check_size(file, of_file["bytes"], remedy)
    _check_digests({f: of["sha256"] for f, of in expected.items() if not _is_noted(f, of["sha256"])}, remedy)


def _file(folder: Path, name: str) -> Path:
    return Path(os.path.normpath(folder / name))  # for a name in a message


def _check_size(file: Path, size: int, remedy: str) -> None:
    if not file.exists():
        raise Damaged(file, "it is missing", remedy)
    found = file.stat().st_size
    if found != size:
        raise Damaged(file, f"it has {found:,} bytes, {size:,} were written", remedy)


def _check_digests(expected: dict[Path, str], remedy: str) -> None:
    states = {file: _state(file) for file in expected}
    size = sum(file.stat().st_size for file in expected)
    if size >= TOLD_FROM:
        print(f"checking {size / GIB:,.0f} GiB in {next(iter(expected)).parent}, once", flush=True)
    for file, found in zip(expected, _digests(list(expected)), strict=True):
        if found != expected[file]:
            raise Damaged(file, "its bytes are not those that were written", remedy)
        _note(file, found, states[file])


def _digests(files: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor() as pool:  # digesting a block lets other threads run
        return list(pool.map(file_digest, files))


def _state(file: Path) -> str:
    stat = file.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _note_of(file: Path) -> Path:
    name = sha256(os.fsencode(file.resolve())).hexdigest()[:32]
    return Path(os.environ.get("DVC_ROOT", ".")) / CHECKED / name


def _is_noted(file: Path, digest: str) -> bool:
    """Return whether the file was found intact before, and has not changed since."""
    try:
        return _note_of(file).read_text(encoding="ascii") == f"{_state(file)} {digest}"
    except (OSError, ValueError):
        return False


def _note(file: Path, digest: str, state: str) -> None:
    """Note that a large file is intact, unless it changed while it was digested or just before."""
    stat = file.stat()
    if stat.st_size < NOTED_FROM or _state(file) != state or time.time_ns() - stat.st_ctime_ns < SETTLED_NS:
        return
    note = _note_of(file)
    with suppress(OSError):  # a project that cannot be written to is checked every time
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}")
        partial.write_text(f"{state} {digest}", encoding="ascii")
        partial.replace(note)
