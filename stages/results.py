"""Tool `results`: the verdict and the table in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from stages.paths import REPORTS

Table = Annotated[Path, typer.Argument(help="The table.")]


def results(path: Table = REPORTS / "results.csv") -> None:
    """Print the verdict, the results table, and where to look next."""
    from lgp.report.table import plain_and_added, read_results, read_verdict, wide_rows
    from lgp.report.terminal import print_table

    plain, added = plain_and_added(read_results(path))
    for line in read_verdict(path.with_name("verdict.txt")):
        print(line)
    print_table("Top-1 accuracy on test, % [95 % interval]", *wide_rows(plain))
    if added:
        print_table("The same with unlabelled images (propagated) or with chosen images (selected)", *wide_rows(added))
    print(f"Report with pictures: {path.with_name('report.md')}. Runs, curves, models: `lgp ui`.")
    print("Encoders for timm: models/ARM/encoder. Change params.yaml and run `lgp repro` again.")
