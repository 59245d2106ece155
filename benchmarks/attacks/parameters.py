"""Parameter files that somebody broke: in their text, and in their values."""

import random
from pathlib import Path
from typing import Any

import yaml
from project import ROOT
from tried import Tried, tried

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 10**30, -(10**30), 0.0, -0.5, 1e-300, 1e308, float("nan"), float("inf"),
    "", " ", "1e-3", "nan", "inf", "-inf", "null", "1_000", "0x10", "é", "猫", "../../x", "/", "a\nb", "\0",
    "a" * 10_000, "${model.depth}", "2020-01-01", [], [[]], [None], {}, {"a": {}}, [1, "a", None], [0.1] * 1000,
    {"": 1},
]  # fmt: skip
ODD_TEXTS = [
    "\t", "\0", "\r", "\ufeff", "\u2028", "\x85", "\x1b", ": ", " #", "- ", "&a ", "*a ", "!!python/object:os.system ",
    "!!binary ", "---\n", "...\n", "%YAML 9\n", "<<: ", "? ", "| ", "> ", "{", "}", "[", "]", "'", '"', "`", "@",
    "\xff", "x: &a [*a]\n", "a: &b {c: *b}\n", "nan", ".inf", "0o17", "1:30", "=", "~",
]  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in nested values, as its container and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *_places(inner))]


def _in_value(rng: random.Random, text: str) -> bytes:
    values = yaml.safe_load(text)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        container, key = rng.choice(_places(values))
        how = rng.random()
        if how < 0.1:
            del container[key]
        elif how < 0.2 and isinstance(container, dict):
            container[rng.choice(["x", "", 1, None, True, 1.5, str(key) + " ", str(key).upper()])] = container[key]
        else:
            container[key] = rng.choice(ODD_VALUES)
    return yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")


def _in_text(rng: random.Random, text: str) -> bytes:
    lines = text.splitlines(keepends=True)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(lines))
        match rng.randrange(6):
            case 0:
                del lines[place : place + rng.choice((1, 3, 20))]
            case 1:
                lines.insert(rng.randrange(len(lines)), lines[place])
            case 2:
                lines[place] = rng.choice((" ", "  ", "\t")) + lines[place]
            case 3:
                lines = lines[: place + 1]
            case _:
                at = rng.randrange(len(lines[place]))
                lines[place] = lines[place][:at] + rng.choice(ODD_TEXTS) + lines[place][at:]
        lines = lines or ["\n"]
    return "".join(lines).encode("utf-8", "surrogatepass")


def _in_bytes(rng: random.Random, text: str) -> bytes:
    data = bytearray(text.encode())
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


HOWS = {"a value": _in_value, "the text": _in_text, "bytes": _in_bytes}


def attack(rng: random.Random, folder: Path) -> Tried:
    """Mutate a preset, and load it as every stage does."""
    how, preset = rng.choice(list(HOWS)), rng.choice(PRESETS)
    file = folder / "params.yaml"
    file.write_bytes(HOWS[how](rng, preset.read_text(encoding="utf-8")))

    def read() -> None:
        from lgp.params.file import load_params, restricted, section_values
        from lgp.workflow.pipeline import SECTIONS

        params = load_params(file)
        for sections in SECTIONS.values():
            section_values(params, sections)
            restricted(params, sections)

    return tried(how, read, folder)
