"""Stage `inputs`: writes digests of each stage's code and of the labels into small files, which DVC compares.

DVC cannot compare the code and the labels by itself. The stage runs with every `dvc repro`, as
`python -m lgp.workflow.inputs`, so it imports little.
"""

import os
import sys
from pathlib import Path

import yaml

from lgp.errors import LgpError
from lgp.workflow.code_digest import code_digests

FOLDER, PARAMS_FILE, LABELS = Path("inputs"), Path("params.yaml"), Path("data/labels")
DIGITS = "digits"  # the built-in images, whose labels never change


def write_inputs(folder: Path, params_file: Path, root: Path) -> None:
    """Write `code/STAGE`, the digest of every stage's code, and `labels`, the state of the labels' source and lists.

    Args:
        folder: where to write.
        params_file: names the source and the lists.
        root: of the project. It contains a cache of the digests.

    Raises:
        LgpError: the parameters are not valid, or the source cannot be read.
    """
    source, lists = _source_and_lists(params_file)
    (folder / "code").mkdir(parents=True, exist_ok=True)
    for stage, digest in code_digests(root).items():
        (folder / "code" / stage).write_text(f"{digest}\n", encoding="utf-8")
    (folder / "labels").write_text(f"{_labels(source, lists)}\n", encoding="utf-8")


def _source_and_lists(params_file: Path) -> tuple[str, list[str]]:
    """Read `data.source` and the files of `labels.lists`. The whole file is checked only where one is missing."""
    try:
        values = yaml.load(params_file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        given = values["labels"].get("lists") or {}
        return str(values["data"]["source"]), [f for files in given.values() for f in _several(files)]
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        from lgp.params.file import load_params

        params = load_params(params_file)  # raises an error that says what is wrong
        return params.data.source, [file for files in params.labels.lists.values() for file in files]


def _several(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def _labels(source: str, lists: list[str]) -> str:
    if source == DIGITS and not lists:
        return DIGITS
    from lgp.data.labels import STATE, labels_state

    try:
        return labels_state(source, lists)
    except LgpError as e:
        # a machine that only trains needs prepared data, not the source; the stage `labels` says what is wrong
        kept = LABELS / STATE
        return kept.read_text(encoding="utf-8").strip() if kept.exists() else f"unreadable: {' '.join(str(e).split())}"


def main() -> None:
    """Write the inputs of the project in this folder."""
    try:
        write_inputs(FOLDER, PARAMS_FILE, Path(os.environ.get("DVC_ROOT", ".")))
    except LgpError as e:
        sys.exit(f"error: {' '.join(str(e).split())}")


if __name__ == "__main__":
    main()
