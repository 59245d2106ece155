"""The `lgp` command: `cli.py` of the checkout, or of the installed package."""

import os
import sys
from pathlib import Path

from lgp.compute.interruption import stopped_by_signals
from lgp.workflow.source_tree import is_checkout, source_root


def main() -> None:
    """Run the command line."""
    root, here = source_root(), Path.cwd()
    if is_checkout(here) and here != root:
        # another checkout, or the copy of one in which an experiment of DVC runs: its own code counts
        os.execv(sys.executable, [sys.executable, str(here / "cli.py"), *sys.argv[1:]])
    # `cli` and `stages` are top-level modules of a checkout only; an installed package keeps them to itself
    sys.path.insert(0, str(root))
    with stopped_by_signals():
        from cli import app

        app()


if __name__ == "__main__":
    main()
