"""Tool `clean`: removes what nothing needs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile
from stages.paths import LABELS, PREPARED

Yes = Annotated[bool, typer.Option("--yes", help="Remove what is listed.")]
Waiting = Annotated[
    bool, typer.Option("--waiting", help="Also resume states of this code: those trainings begin anew.")
]


def clean(
    yes: Yes = False, waiting: Waiting = False, params_file: ParamsFile = DEFAULT_PARAMS, debug: Debug = False
) -> None:
    """List expired resume states, caches that nothing refers to and what kills left; with `--yes` remove them."""
    from lgp.errors import LgpError
    from lgp.params.file import load_params
    from lgp.report.terminal import print_table
    from lgp.training.left_states import RESUME, running
    from lgp.workflow.leftovers import age_text, leftovers, size_of, size_text, total

    root = Path(os.environ.get("DVC_ROOT", "."))
    found = leftovers(root, load_params(params_file), PREPARED, LABELS, waiting)
    # after the search, which takes long; what a stage writes now is in the list too
    if names := running(root / RESUME):
        raise LgpError(f"{', '.join(names)} runs: wait for it, or stop it, and clean then")
    if not found:
        print("nothing to clean")
        return
    rows = [[left.what, str(left.paths[0]), size_text(size_of(left.paths)), age_text(left.paths)] for left in found]
    print_table("Not needed", ["what", "where", "size", "age"], rows)
    whole = size_text(total(found))
    if not yes:
        print(f"nothing is removed: `lgp clean --yes{' --waiting' if waiting else ''}` removes these {whole}")
        return
    kept = [left.what for left in found if not left.remove()]
    print(f"clean: removed {len(found) - len(kept)} of {len(found)}, {whole} in all")
    for what in kept:
        print(f"clean: kept, because its training runs: {what}")
