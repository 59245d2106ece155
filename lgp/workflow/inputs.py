"""What DVC cannot see by itself, as small files that it compares: a digest of each stage's code, and of the labels.

Light: it runs with every `dvc repro`.
"""

from pathlib import Path

from lgp.workflow.code_digest import code_digests

CODE, LABELS = "code", "labels"
CACHE = Path(".lgp") / "code.json"


def write_inputs(folder: Path, params_file: Path, root: Path) -> None:
    """Write `code/STAGE` for every stage, and `labels`, the state of the labels' source and of the lists.

    Args:
        folder: where to write.
        params_file: names the source and the lists.
        root: of the project, which keeps a cache of the digests.

    Raises:
        LgpError: the parameters are not right, or the source cannot be read.
    """
    from lgp.params.file import load_params

    params = load_params(params_file)
    (folder / CODE).mkdir(parents=True, exist_ok=True)
    for stage, digest in code_digests(root / CACHE).items():
        (folder / CODE / stage).write_text(f"{digest}\n", encoding="utf-8")
    (folder / LABELS).write_text(f"{_labels(params.data.source, params.labels.lists)}\n", encoding="utf-8")


def _labels(source: str, lists: dict[str, tuple[str, ...]]) -> str:
    if source == "digits" and not lists:  # which never changes; nothing heavy is imported for it
        return source
    from lgp.data.labels import labels_state

    return labels_state(source, [file for files in lists.values() for file in files])
