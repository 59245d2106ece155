"""Tables of images that somebody broke: bytes, encodings, columns, cells, paths."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sources import picture, prepare
from tried import Tried, Wrong, tried

SECRET = "secret.png"
ODD_CELLS: list[Any] = [
    None, "", " ", "\0", "\n", "\r\n", "a\nb", '"', "'", ",", ";", "\t", "=1+1", "nan", "NaN", "null", "-1", "1e400",
    "0", "True", "é", "e\u0301", "猫🐈", "\u202e", "\ufeff", "\udcff", "<b>", "$x$", "a" * 255, "a" * 200_000,
    "/", ".", "..", f"../{SECRET}", "a/../../" + SECRET, "C:\\x.png", "http://[",
    "file:///etc/passwd", "~/x.png", "$HOME/x.png",
    "%2e%2e/x.png", "train", "test", "val", "TRAIN ", "unlabeled",
]  # fmt: skip
ODD_VALUES: list[Any] = [*ODD_CELLS, 0, -1, 2**63, 1.5, float("nan"), True, [], ["a"], {}, {"a": 1}]
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis")
Rows = list[dict[Any, Any]]


def _rows(names: list[str]) -> Rows:
    # a group is of one part
    return [
        {"path": name, "label": f"class {i % 3}", "split": "test" if i % 4 == 3 else "train", "group": f"g{i % 4}"}
        for i, name in enumerate(names)
    ]


def _cells(rng: random.Random, rows: Rows, values: list[Any]) -> None:
    for _ in range(rng.choice((1, 1, 3, 10))):
        row = rng.choice(rows)
        row[rng.choice(list(row))] = rng.choice(values)


def _columns(rng: random.Random, rows: Rows, _: list[Any]) -> None:
    column = rng.choice(list(rows[0]))
    name = rng.choice(
        ["", " path", "PATH", "image", "file_name", "labels", "x" * 300, "a\nb", "é", "path", "label", None]
    )
    for row in rows:
        value = row.pop(column)
        if name is not None:
            row[name] = value


def _duplicates(rng: random.Random, rows: Rows, _: list[Any]) -> None:
    for row in rng.sample(rows, rng.randrange(1, len(rows))):
        again = dict(row) | {"label": rng.choice(["class 0", "other", ""])}
        again["path"] = rng.choice(
            [row["path"], f"./{row['path']}", row["path"].replace("/", "//"), row["path"].upper()]
        )
        rows.append(again)


def _nothing(rng: random.Random, rows: Rows, _: list[Any]) -> None:
    del rows[rng.randrange(len(rows)) :]


def _outside(rng: random.Random, rows: Rows, _: list[Any]) -> None:
    for row in rng.sample(rows, 3):
        row["path"] = rng.choice([f"../{SECRET}", f"a/../../{SECRET}", f"./.././{SECRET}"])


CHANGES: dict[str, Callable[[random.Random, Rows, list[Any]], None]] = {
    "odd cells": _cells,
    "columns": _columns,
    "paths twice": _duplicates,
    "few rows": _nothing,
    "paths out of the folder": _outside,
}


def _encoded(rng: random.Random, text: str) -> bytes:
    """Encode text, mostly as tables should be."""
    if rng.random() < 0.8:
        return text.encode("utf-8", "surrogatepass")
    return text.encode(rng.choice(ENCODINGS), "replace")


def _csv(rng: random.Random, rows: Rows) -> bytes:
    buffer = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["path"]
    writer = csv.DictWriter(
        buffer, names, delimiter=rng.choice(",;\t|"), quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    )
    writer.writeheader()
    writer.writerows(rows)
    return _encoded(rng, buffer.getvalue())


def _jsonl(rng: random.Random, rows: Rows) -> bytes:
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    lines = [rng.choice(("{}", "[]", "1", "null", "{", '{"path": ')) if rng.random() < 0.05 else line for line in lines]
    text = json.dumps(rows) if rng.random() < 0.2 else "\n".join(lines)
    return _encoded(rng, text)


def _parquet(rng: random.Random, rows: Rows) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row)) or ["path"]
    columns = [_column([row.get(name) for row in rows]) for name in names]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, [str(name) for name in names]), buffer)
    return buffer.getvalue()


def _column(values: list[Any]) -> Any:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.array([None if value is None else repr(value) for value in values])


FORMS: dict[str, Callable[[random.Random, Rows], bytes]] = {
    "csv": _csv,
    "jsonl": _jsonl,
    "parquet": _parquet,
}


def broken(rng: random.Random, data: bytes) -> bytes:
    """Return data with some bytes flipped, cut out, or put in."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 16))):
        if not result:
            break
        place = rng.choice((rng.randrange(len(result)), rng.randrange(min(len(result), 64))))
        match rng.randrange(6):
            case 0:
                del result[place : place + rng.choice((1, 4, 100))]
            case 1:
                result[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
            case 2:
                del result[place:]
            case _:
                result[place] ^= 1 << rng.randrange(8)
    return bytes(result)


def attack(rng: random.Random, folder: Path) -> Tried:
    """Write images and a table of them that is broken in one way, and prepare it."""
    source = folder / "source"
    (source / "a").mkdir(parents=True)
    names = [f"a/{number}.png" for number in range(12)]
    for name in names:
        (source / name).write_bytes(picture(rng))
    (folder / SECRET).write_bytes(picture(rng))
    form, how = rng.choice(list(FORMS)), rng.choice([*CHANGES, "bytes"])
    rows = _rows(names)
    if how != "bytes":
        CHANGES[how](rng, rows, ODD_CELLS if form == "csv" else ODD_VALUES)
    data = FORMS[form](rng, rows)
    table = source / f"table.{form}"
    table.write_bytes(broken(rng, data) if how == "bytes" else data)

    def work() -> None:
        images = prepare(str(table), folder)
        if any(SECRET in path for path in images.paths):
            raise Wrong(f"an image out of the folder was read: {images.paths}")

    return tried(f"{form}: {how}", work, folder)
