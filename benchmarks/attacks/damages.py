"""Files between stages that are damaged at any offset: the next stage tells, or its results are the same bytes."""

import random
from collections.abc import Callable
from pathlib import Path

from project import COMMANDS, Template, differences, digests, run
from tried import Tried, fault_of

DAMAGES: dict[str, Callable[[random.Random, bytes], bytes | None]] = {
    "flipped": lambda rng, data: _flipped(data, rng.randrange(max(1, len(data)))),
    "cut": lambda rng, data: data[: rng.randrange(max(1, len(data)))],
    "emptied": lambda rng, data: b"",
    "replaced": lambda rng, data: rng.choice((b"{}", b"[]", b"null", b"\0" * len(data), rng.randbytes(len(data)))),
    "removed": lambda rng, data: None,
}


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes(byte ^ 1 << place % 8 for byte in data[place : place + 1]) + data[place + 1 :]


def _results(folder: Path) -> list[str]:
    """Return the files that stages have left, which the user did not write."""
    return [path for path in digests(folder) if path not in ("params.yaml", "held_out.csv")]


def attack(rng: random.Random, folder: Path, template: Template) -> list[Tried]:
    """Damage one file of the project before a command, and run the command."""
    number = rng.randrange(1, len(COMMANDS))
    project = template.before(number, folder / "project")
    path, how = rng.choice(_results(project)), rng.choice(list(DAMAGES))
    content = DAMAGES[how](rng, (project / path).read_bytes())
    if content is None:
        (project / path).unlink()
    else:
        (project / path).write_bytes(content)
    damaged = digests(project).get(path)
    ended = run(COMMANDS[number], project)
    fault = fault_of(ended)
    if fault is None and ended.code == 0:
        expected = template.expected(number) | ({path: damaged} if damaged else {})
        found = digests(project)
        others = [other for other in differences(found, expected) if other != path]
        fault = f"another result without a word: {', '.join(others)}" if others else None
    said = f"lgp {' '.join(COMMANDS[number])}, {path} {how}"
    if fault is None:
        return [Tried(how, told=ended.code > 0)]
    return [Tried(how, f"{fault} ({said})", ended.output[-1500:])]
