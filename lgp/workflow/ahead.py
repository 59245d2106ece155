"""Outputs that are computed ahead. They wait in `.lgp/ahead` until the stage that they belong to asks for them."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lgp.compute.seals import check_sealed
from lgp.errors import LgpError
from lgp.models.files import read_provenance
from lgp.params.file import Params, load_params
from lgp.training.left_states import remove
from lgp.workflow.stage import StageSpec, digests_of

AHEAD = Path(".lgp") / "ahead"
COMPUTES_AHEAD = "LGP_COMPUTES_AHEAD"  # a variable of the environment, set in a process whose outputs wait
SAID = "said.txt"  # what the evaluation printed. It is written last: without it, outputs are not taken


def project_root() -> Path:
    """Return the folder of the project: DVC names it."""
    return Path(os.environ.get("DVC_ROOT", "."))


def folder_ahead(arm: str, task: str) -> Path | None:
    """Return the folder in which the outputs of an evaluation wait, if this process computes ahead."""
    return _folder(arm, task) if COMPUTES_AHEAD in os.environ else None


def take(specs: Sequence[StageSpec], params_file: Path) -> str | None:
    """Move the outputs of a command to their places, if they wait and belong to its parameters, inputs and code.

    Args:
        specs: of each evaluation of the command. The last output of each is its classifier, with its provenance.
        params_file: the parameters.

    Returns:
        What the command printed as it computed them; None where there is nothing to take.
    """
    params = load_params(params_file)
    if not all(_waits(spec, params) for spec in specs):
        return None
    said = (_place(specs[0]) / SAID).read_text(encoding="utf-8", errors="backslashreplace")
    for spec in specs:
        for source, target in zip(_outputs(spec), spec.writes, strict=True):
            partial = target.with_name(f".partial.{target.name}")
            remove(partial)
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, partial)  # a link may lead to another disk
            remove(target)
            partial.replace(target)
    discard(specs)
    return said


def finish(specs: Sequence[StageSpec], said: str, code: Mapping[str, str]) -> None:
    """Let the outputs of a command be taken. Those of other code than was loaded go.

    Args:
        specs: of each evaluation of the command, whose outputs are complete.
        said: what the command printed.
        code: stage → the digest of its code, of the time when the code was loaded.
    """
    for spec in specs:
        if read_provenance(_outputs(spec)[-1]).get("digests", {}).get("code") != code[spec.name]:
            discard(specs)
            return
    for spec in specs:
        (_place(spec) / SAID).write_text(said, encoding="utf-8", errors="backslashreplace")


def discard(specs: Sequence[StageSpec]) -> None:
    """Remove what waits for a command."""
    for spec in specs:
        remove(_place(spec))


def is_made(specs: Sequence[StageSpec], params: Params) -> bool:
    """Return whether all outputs of a command are there or wait, from its parameters, inputs and code."""
    return all(_belong(spec, spec.writes, params) or _waits(spec, params) for spec in specs)


def _waits(spec: StageSpec, params: Params) -> bool:
    return (_place(spec) / SAID).exists() and _belong(spec, _outputs(spec), params)


def _folder(arm: str, task: str) -> Path:
    return AHEAD / f"{arm}-{task}"


def _place(spec: StageSpec) -> Path:
    return _folder(spec.arm, spec.task)


def _outputs(spec: StageSpec) -> list[Path]:
    return [_place(spec) / path.name for path in spec.writes]


def _belong(spec: StageSpec, outputs: Sequence[Path], params: Params) -> bool:
    """Return whether outputs are complete, and come from these parameters, inputs and this code."""
    if not all(path.exists() for path in outputs):
        return False
    try:
        check_sealed(outputs[-1], "")
        made: dict[str, Any] = read_provenance(outputs[-1])
        return bool(made.get("digests") == digests_of(spec, params, project_root()))
    except LgpError:  # damaged, or an input is missing: the stage itself tells
        return False
