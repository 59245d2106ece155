"""Tool `status`: what waits, what lies about, and what `lgp repro` would do."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile

if TYPE_CHECKING:
    from lgp.params.run import RunParams
    from lgp.training.left_states import LeftState

# below .lgp; `lgp clean` removes of them what nothing refers to
CACHES = {
    "features": "features of encoders",
    "outcomes": "outcomes kept for other names of the same labels",
    "downloads": "images of remote sources",
    "checked": "notes of files that are intact",
}


def status(params_file: ParamsFile = DEFAULT_PARAMS, debug: Debug = False) -> None:
    """Show interrupted trainings, caches, runs that are not closed, and what `lgp repro` would run and why."""
    from lgp.params.file import load_params

    root, run = Path(os.environ.get("DVC_ROOT", ".")), load_params(params_file).run
    _show_states(root)
    _show_caches(root)
    _show_runs(root, run)
    _show_pending(root)


def _show_states(root: Path) -> None:
    from lgp.report.terminal import print_table
    from lgp.training.left_states import RESUME, left_states, running
    from lgp.workflow.code_digest import code_digests
    from lgp.workflow.leftovers import age_text, is_expired, size_of, size_text

    digests = code_digests(root)

    def then(state: "LeftState") -> str:
        if is_expired(state, digests):
            return f"other code wrote it: `{state.command} --resume` takes it, `lgp clean` removes it"
        by_dvc = "" if state.task == "conflict" else "`dvc repro` or "  # a tool, no stage of the pipeline
        goes_on = f"{by_dvc}`{state.command}` goes on from it"
        return f"{goes_on} if parameters and inputs are as they were, and begins anew if not"

    rows = [[s.training, size_text(size_of(s.files)), age_text(s.files), then(s)] for s in left_states(root / RESUME)]
    if rows:
        print_table("Resume states, of trainings that stopped or run now", ["training", "size", "age", "then"], rows)
    else:
        print("There is no resume state.")
    for name in running(root / RESUME):
        print(f"Runs now: {name}.")


def _show_caches(root: Path) -> None:
    from lgp.report.terminal import print_table
    from lgp.workflow.leftovers import age_text, size_of, size_text

    folders = {what: root / ".lgp" / name for name, what in CACHES.items()}
    entries = {what: [folder, *folder.glob("*")] for what, folder in folders.items() if folder.is_dir()}
    rows = [
        [what, str(paths[0]), size_text(size_of(paths[:1])), age_text(paths)] for what, paths in sorted(entries.items())
    ]
    if rows:
        print_table("Caches", ["what", "folder", "size", "last used"], rows)


def _show_runs(root: Path, run: "RunParams") -> None:
    from lgp.compute.units import time_text
    from lgp.report.terminal import print_table
    from lgp.workflow.kept_runs import kept_files
    from lgp.workflow.mlflow_store import has_store
    from lgp.workflow.tracking import visitor

    ready, _ = kept_files(root)
    if ready:
        print(f"Runs that MLflow did not take: {len(ready)}. `lgp tracking sync` sends them.")
    if not has_store(run.tracking_uri, root):
        print("No run is tracked yet.")
        return
    found = visitor(run.tracking_uri, run.experiment, root).ask(lambda m: m.unfinished())
    rows = [[r.name, r.run_id, time_text((time.time() - r.started_ms / 1000) / 3600)] for r in found or []]
    if rows:
        print_table("Runs that are not closed: their stages run, or were killed", ["run", "id", "age"], rows)
    elif found is not None:
        print("All tracked runs are closed.")


def _show_pending(root: Path) -> None:
    from lgp.errors import LgpError
    from lgp.report.terminal import print_table
    from lgp.workflow.pending import NOT_YET, pending

    try:
        found = pending(root)
    except LgpError as e:
        print(f"`lgp repro`: {e}.")
        return
    if not found.changed:
        print("`lgp repro` would run nothing but `inputs`.")
        return
    if {reason for why in found.changed.values() for reason in why} == {NOT_YET}:
        print(f"`lgp repro` would run {len(found.changed)} stages, which have not run yet: {', '.join(found.changed)}.")
        return
    print_table(
        "`lgp repro` would run", ["stage", "why"], [[name, "; ".join(why)] for name, why in found.changed.items()]
    )
    if found.behind:
        print(f"Then, where these write something else: {', '.join(found.behind)}.")
