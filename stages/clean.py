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
    """List expired resume states, unused caches and halves that killed commands left; with `--yes` remove them."""
    from lgp.errors import LgpError
    from lgp.params.file import load_params
    from lgp.report.terminal import print_table
    from lgp.training.left_states import RESUME, running
    from lgp.workflow.leftovers import age_text, leftovers, size_of, size_text

    root = Path(os.environ.get("DVC_ROOT", "."))
    found = leftovers(root, load_params(params_file), PREPARED, LABELS, waiting)
    # after the search, which takes long; what a stage writes now is in the list too
    if names := running(root / RESUME):
        raise LgpError(f"a training runs ({', '.join(names)}): wait for it or stop it, then clean again")
    if not found:
        print("nothing to clean")
        return
    sizes = [size_of(left.paths) for left in found]
    rows = [
        [left.what, str(left.paths[0]), size_text(size), age_text(left.paths)]
        for left, size in zip(found, sizes, strict=True)
    ]
    print_table("Not needed", ["what", "where", "size", "age"], rows)
    if not yes:
        more = " --waiting" if waiting else ""
        print(f"nothing is removed: `lgp clean --yes{more}` removes these {size_text(sum(sizes))}")
        return
    removed = [left.remove() for left in found]
    freed = sum(size for size, gone in zip(sizes, removed, strict=True) if gone)
    print(f"clean: removed {sum(removed)} of {len(found)}, {size_text(freed)}")
    for left, gone in zip(found, removed, strict=True):
        if not gone:
            print(f"clean: kept, because its training runs: {left.what}")
