"""Tool `bench`: the speed of the parts on this machine."""

from pathlib import Path
from typing import Annotated

import typer

Quick = Annotated[bool, typer.Option("--quick", help="Two sizes and few steps: one or two minutes, else five.")]
Folder = Annotated[Path, typer.Option(help="Takes DATE-DEVICE.json and .md.")]


def bench(quick: Quick = False, folder: Folder = Path("benchmarks")) -> None:
    """Measure training steps, views, probing, saving and a pipeline with nothing to do on this machine."""
    from lgp import bench as benchmark

    page = benchmark.write(benchmark.bench(quick), folder)
    print(page.read_text(encoding="utf-8"))
    print(f"written to {page} and {page.with_suffix('.json')}")
