"""Editing a parameter file: values change, comments and order stay."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lgp.errors import LgpError
from lgp.params.file import Params, load_params

KEY = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z_0-9]+):(?P<value>[^#\n]*?)(?P<comment>\s+#.*)?")


def write_values(file: Path, values: Mapping[str, Any]) -> Params:
    """Set keys of a parameter file, as `key` or `section.key`. Return the parameters that it then holds.

    A section may lie in another, as in `finetune.10pct.epochs`.

    Raises:
        LgpError: the file is not valid afterwards. It then keeps its old text.
    """
    before = file.read_text(encoding="utf-8")
    text = before
    for key, value in values.items():
        text = with_value(text, key, value)
    file.write_text(text, encoding="utf-8")
    try:
        return load_params(file)
    except LgpError:
        file.write_text(before, encoding="utf-8")
        raise


def with_values(params: Params, values: Mapping[str, Any]) -> Params:
    """Return parameters with other values, given as `section.key`."""
    changed = params.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        *sections, name = key.split(".")
        place = changed
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return Params.model_validate(changed)


def as_written(value: Any) -> str:
    """Return a value as a parameter file has it, on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def with_value(text: str, key: str, value: Any) -> str:
    """Return the text of a parameter file with another value. A key that is missing is added to its section."""
    section, _, name = key.rpartition(".")
    lines = text.splitlines()
    start, end = _section(lines, section)
    indent = "  " * (section.count(".") + 1 if section else 0)
    written = as_written(value)
    for number in range(start, end):
        found = KEY.fullmatch(lines[number])
        if found and found["indent"] == indent and found["key"] == name:
            last = _end_of_value(lines, number, end, len(indent))
            lines[number:last] = [f"{indent}{name}: {written}{found['comment'] or ''}"]
            return "\n".join([*lines, ""])
    return "\n".join([*lines[:start], f"{indent}{name}: {written}", *lines[start:], ""])


def _section(lines: list[str], section: str) -> tuple[int, int]:
    """Return the lines of a section, from behind its name."""
    start, end = 0, len(lines)
    for depth, name in enumerate(section.split(".") if section else []):
        head = re.compile(rf"{'  ' * depth}{re.escape(name)}:(\s|$)")
        found = next((i for i in range(start, end) if head.match(lines[i])), None)
        if found is None:
            raise LgpError(f"the parameter file has no section {section}: add it")
        if lines[found].partition(":")[2].partition("#")[0].strip():
            raise LgpError(
                f"the section {section} is on one line: give each of its keys a line of its own, indented by 2"
            )
        start = found + 1
        end = next((i for i in range(start, end) if _is_at(lines[i], 2 * depth)), end)
    return start, end


def _is_at(line: str, indent: int) -> bool:
    """Return whether a line has a key that is indented by `indent` or less."""
    return bool(line.strip()) and not line.lstrip().startswith("#") and _indent(line) <= indent


def _end_of_value(lines: list[str], start: int, end: int, indent: int) -> int:
    """Return the line behind a value that may go on over lines.

    These are indented deeper, close a bracket or, as deep as the key, begin with a dash.
    """
    last = start + 1
    while last < end and (_indent(lines[last]) > indent or lines[last].lstrip()[:1] in ("]", "}", "-")):
        last += 1
    while lines[last - 1].lstrip().startswith("#"):  # about the value, not of it
        last -= 1
    return last


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip()) if line.strip() else 0
