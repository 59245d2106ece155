"""Tool `results`: the verdict and the table in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from stages.paths import REPORTS

Table = Annotated[Path, typer.Argument(help="The table.")]


def results(path: Table = REPORTS / "results.csv") -> None:
    """Print the verdict, the results table, and where to look next."""
    from lgp.report.table import read_results, read_verdict, wide_rows
    from lgp.report.terminal import print_table

    found = read_results(path)
    for line in read_verdict(path.with_name("verdict.txt")):
        print(line)
    print_table("Top-1 accuracy on test, % [95 % interval]", *wide_rows(found))
    header, rows = wide_rows(found, added=True)
    if header[1:]:
        print_table("The same with unlabelled images (propagated) or with chosen images (selected)", header, rows)
    print(f"Report with pictures: {path.with_name('report.md')}. Runs, curves, models: `lgp ui`.")
    print("Encoders for timm: models/ARM/encoder. Change params.yaml and run `dvc repro` again.")
