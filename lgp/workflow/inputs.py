"""Stage `inputs`: writes digests of each stage's code and of the sources into small files, which DVC compares.

DVC cannot compare the code and the sources by itself. The stage runs with every `dvc repro`, as
`python -m lgp.workflow.inputs`, so it imports little.
"""

import os
import sys
from pathlib import Path

import yaml

from lgp.errors import LgpError
from lgp.workflow.code_digest import code_digests

FOLDER, PARAMS_FILE = Path("inputs"), Path("params.yaml")
PREPARED, LABELS = Path("data/prepared"), Path("data/labels")
DIGITS = "digits"  # the built-in images, whose labels never change


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
    for stage, digest in code_digests(root).items():
        (folder / "code" / stage).write_text(f"{digest}\n", encoding="utf-8")
    for name, state in (("images", images), ("labels", labels)):
        (folder / name).write_text(f"{state}\n", encoding="utf-8")


def _states(params_file: Path) -> tuple[str, str]:
    """Return the state of the images, and that of the labels with the lists."""
    if _is_digits_alone(params_file):
        return DIGITS, DIGITS
    from lgp.data.labels import STATE as OF_LABELS
    from lgp.data.labels import labelling_state
    from lgp.data.preparation import STATE as OF_IMAGES
    from lgp.data.sources.opening import images_state, open_sources
    from lgp.params.file import load_params

    params = load_params(params_file)
    try:
        offers = open_sources(params.data.source, params.data.columns, params.labels.files)
        lists = [file for files in params.labels.lists.values() for file in files]
        return images_state(offers), labelling_state(offers, lists)
    except LgpError as e:
        # a machine that only trains needs prepared data, not the source; the stage `prepare` says what is wrong
        said = f"unreadable: {' '.join(str(e).split())}"
        kept = (PREPARED / OF_IMAGES, LABELS / OF_LABELS)
        states = [file.read_text(encoding="utf-8").strip() if file.exists() else said for file in kept]
        return states[0], states[1]


def _is_digits_alone(params_file: Path) -> bool:
    """Return whether the built-in images are used, without tables and lists. The whole file is not checked for it."""
    try:
        values = yaml.load(params_file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        labels = values["labels"]
        return values["data"]["source"] == DIGITS and not labels.get("lists") and not labels.get("files")
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError):
        return False


def main() -> None:
    """Write the inputs of the project in this folder."""
    try:
        write_inputs(FOLDER, PARAMS_FILE, Path(os.environ.get("DVC_ROOT", ".")))
    except LgpError as e:
        sys.exit(f"error: {' '.join(str(e).split())}")


if __name__ == "__main__":
    main()
