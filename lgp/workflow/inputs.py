"""Stage `inputs`: writes digests of each stage's code and of the sources into small files, which DVC compares.

DVC cannot compare the code and the sources by itself. The stage runs with every `dvc repro`, as
`python -m lgp.workflow.inputs`, so it imports little.
"""

import difflib
import gc
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from lgp.errors import LgpError, NoSource, one_line
from lgp.params.arms import BASELINES, TRAINED, how_to_get
from lgp.workflow.code_digest import code_digests

FOLDER, PARAMS_FILE = Path("inputs"), Path("params.yaml")
DIGITS = "digits"  # the built-in images, whose labels never change
PREPARED, LABELS = Path("data/prepared"), Path("data/labels")
CONTROLS = Path("controls/dvc.yaml")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def write_inputs(folder: Path, params_file: Path, root: Path) -> None:
    """Write `code/STAGE`, the digest of every stage's code, and `images` and `labels`, the states of the sources.

    Args:
        folder: where to write.
        params_file: names the sources, tables and lists.
        root: of the project. It contains a cache of the digests.

    Raises:
        LgpError: the parameters are not valid.
    """
    images, labels = _states(params_file)
    (folder / "code").mkdir(parents=True, exist_ok=True)
    code = {f"code/{stage}": digest for stage, digest in code_digests(root).items()}
    for name, text in (code | {"images": images, "labels": labels}).items():
        (folder / name).unlink(missing_ok=True)  # it may be a link into DVC's cache, which must not change
        (folder / name).write_text(f"{text}\n", encoding="utf-8")


def check_arms(params_file: Path, root: Path) -> None:
    """Raise `LgpError` for an arm in `arms` that no stage makes and that is not imported, before anything trains."""
    arms = yaml.load(params_file.read_text(encoding="utf-8"), _LOADER).get("arms") or []
    pipelines = [file.read_text(encoding="utf-8") for file in (root / "dvc.yaml", root / CONTROLS) if file.exists()]
    named = (*TRAINED, *BASELINES)
    for arm in arms:
        made = any(f"models/{arm}/" in text for text in pipelines)
        if arm in named or made or (root / "models" / arm / "encoder").exists():
            continue
        near = difflib.get_close_matches(str(arm), named, 1)
        meant = f"did you mean {near[0]}? If not, " if near else ""
        raise LgpError(f"arms names {arm}, and there is no such arm: {meant}{how_to_get(arm)}")


def _states(params_file: Path) -> tuple[str, str]:
    """Return the state of the images, and that of the labels with the lists."""
    data, lists = _data_and_lists(params_file)
    if data["source"] == DIGITS and not data.get("labels") and not lists:
        return DIGITS, DIGITS
    from lgp.data.sources.opening import open_sources
    from lgp.data.sources.states import STATE, images_state, labelling_state

    sources, columns, tables, noticed_by = _plain(data) or _checked(data, params_file)
    try:
        offers = open_sources(sources, columns, tables)
        return images_state(offers, noticed_by, sources), labelling_state(offers, lists)
    except NoSource as e:
        # a machine that only trains needs prepared data, not the source
        print(f"{one_line(e)}: prepared images and labels are taken as they are", flush=True)
        kept = (PREPARED / STATE, LABELS / STATE)
        states = [
            file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else _said(e) for file in kept
        ]
        return states[0], states[1]
    except LgpError as e:
        return _said(e), _said(e)  # the stages `prepare` and `labels` run, and fail with what is wrong


def _plain(data: dict[str, Any]) -> tuple[list[Any], Any, list[str], str] | None:
    """Return sources, columns, tables and `noticed_by` if all of them are text. None: they need checking.

    Pydantic takes more time to import than a small source takes to list. The stage `prepare` checks every key.
    """
    from lgp.data.sources.offers import Columns

    sources, columns, tables = data["source"], data.get("columns") or {}, data.get("labels") or []
    sources, tables = ([value] if isinstance(value, str) else value for value in (sources, tables))
    noticed_by = data.get("noticed_by", "time")
    known = isinstance(columns, dict) and columns.keys() <= set(Columns._fields) and noticed_by in ("time", "digest")
    if not (known and isinstance(sources, list) and sources and isinstance(tables, list)):
        return None
    texts = [*sources, *tables, *(name for name in columns.values() if name is not None)]
    if not all(isinstance(text, str) for text in texts):
        return None
    return sources, Columns(**columns), tables, noticed_by


def _checked(data: dict[str, Any], params_file: Path) -> tuple[list[Any], Any, list[str], str]:
    """Return the same of any valid section `data`. Raise `LgpError` for one that is not."""
    from lgp.params.data import DataParams

    try:
        params = DataParams.model_validate(data)
    except ValueError:
        from lgp.params.file import load_params

        params = load_params(params_file).data  # raises an error that says what is wrong
    return params.source, params.columns, list(params.labels), params.noticed_by


def _data_and_lists(params_file: Path) -> tuple[dict[str, Any], list[str]]:
    """Read the section `data`, and the files of `labels.lists`. The whole file is checked only if one is missing."""
    try:
        values = yaml.load(params_file.read_text(encoding="utf-8"), _LOADER)
        given = values["labels"].get("lists") or {}
        return values["data"] | {"source": values["data"]["source"]}, [f for of in given.values() for f in _several(of)]
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        from lgp.params.file import load_params

        params = load_params(params_file)  # raises an error that says what is wrong
        lists = [file for files in params.labels.lists.values() for file in files]
        return params.data.model_dump(mode="json"), lists


def _said(error: LgpError) -> str:
    return f"unreadable: {' '.join(str(error).split())}"


def _several(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def main() -> None:
    """Write the inputs of the project in this folder."""
    gc.disable()  # a short life, and 15 % of the time with 60,000 files
    try:
        root = Path(os.environ.get("DVC_ROOT", "."))
        write_inputs(FOLDER, PARAMS_FILE, root)
        check_arms(PARAMS_FILE, root)
    except LgpError as e:
        sys.exit(f"error: {one_line(e)}")


if __name__ == "__main__":
    main()
