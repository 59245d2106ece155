"""Outputs that were computed ahead. They wait in `.lgp/ahead` until the stage that they belong to asks for them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lgp.compute.seals import check_sealed
from lgp.errors import LgpError
from lgp.models.files import read_provenance
from lgp.params.file import Params, load_params
from lgp.training.left_states import remove
from lgp.workflow.stage import StageSpec, digests_of

AHEAD = Path(".lgp") / "ahead"
SAID = "said.txt"  # what the evaluation printed


def project_root() -> Path:
    """Return the folder of the project: DVC names it."""
    return Path(os.environ.get("DVC_ROOT", "."))


def take(specs: Sequence[StageSpec], params_file: Path) -> str | None:
    """Move the outputs of a command to their places, if they wait and belong to its parameters, inputs and code.

    Args:
        specs: of each evaluation of the command. The last output of each is its classifier, with its provenance.
        params_file: the parameters.

    Returns:
        What the command printed as it computed them; None where there is nothing to take.
    """
    params = load_params(params_file)
    if not all(_belong(spec, _outputs(spec, _place(spec)), params) for spec in specs):
        return None
    said = (_place(specs[0]) / SAID).read_text(encoding="utf-8", errors="backslashreplace")
    for spec in specs:
        _move(_outputs(spec, _place(spec)), spec.writes)
    discard(specs)
    return said


def put_by(specs: Sequence[StageSpec], said: str) -> None:
    """Move the outputs of a command away from their places, where they wait for its stage.

    Args:
        specs: of each evaluation of the command, which has published them.
        said: what the command printed.
    """
    for spec in specs:
        place = _place(spec)
        partial = place.with_name(f".partial.{place.name}")
        remove(partial)
        remove(place)
        partial.mkdir(parents=True)
        _move(spec.writes, _outputs(spec, partial))
        (partial / SAID).write_text(said, encoding="utf-8", errors="backslashreplace")
        partial.replace(place)


def discard(specs: Sequence[StageSpec]) -> None:
    """Remove what waits for a command."""
    for spec in specs:
        remove(_place(spec))


def is_made(specs: Sequence[StageSpec], params: Params) -> bool:
    """Return whether all outputs of a command are there or wait, from its parameters, inputs and code."""
    return all(
        _belong(spec, spec.writes, params) or _belong(spec, _outputs(spec, _place(spec)), params) for spec in specs
    )


def _place(spec: StageSpec) -> Path:
    return AHEAD / f"{spec.arm}-{spec.task}"


def _outputs(spec: StageSpec, place: Path) -> list[Path]:
    return [place / path.name for path in spec.writes]


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


def _move(before: Sequence[Path], after: Sequence[Path]) -> None:
    for source, target in zip(before, after, strict=True):
        remove(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
