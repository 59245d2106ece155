"""The `lgp` command: the stages of the pipeline, and a few tools around it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lgp.errors import LgpError, is_disk_full
from stages.cl import cl
from stages.fewshot import fewshot
from stages.graft import graft
from stages.joint import joint
from stages.linear import linear
from stages.mim import mim
from stages.options import DEFAULT_PARAMS, ParamsFile
from stages.paths import REPORTS
from stages.prepare import prepare
from stages.report import report
from stages.reverse import reverse

PIPELINE, CONTROLS, TOOLS = "Pipeline", "Controls of the paper", "Tools"


class OneLineErrors(TyperGroup):
    """Prints a caller's mistake as one line and exits with 1; `--debug` of a stage shows the traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (LgpError, OSError, KeyboardInterrupt) as e:
            if ctx.find_root().meta.get("lgp.debug"):
                raise
            if isinstance(e, KeyboardInterrupt):
                print(
                    "stopped: run the same command again, a training goes on where its last state was saved",
                    file=sys.stderr,
                )
                raise typer.Exit(130) from None
            print(f"error: {_line(e)}", file=sys.stderr)
            raise typer.Exit(1) from None


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and is_disk_full(error):
        return f"disk full while writing {error.filename or 'a file'}: free some space and run again"
    return " ".join(str(error).split())


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (prepare, mim, cl, graft, linear, fewshot, report):
    app.command(rich_help_panel=PIPELINE)(command)
for command in (joint, reverse):
    app.command(rich_help_panel=CONTROLS)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("lgp"))
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Layer Grafted Pre-training: from a folder of images to a label-efficient encoder."""


preset_app = typer.Typer(help="Whole parameter files.", no_args_is_help=True)
app.add_typer(preset_app, name="preset", rich_help_panel=TOOLS)


@preset_app.command("list")
def preset_list() -> None:
    """List the presets."""
    from lgp import presets

    for name, line in presets.names().items():
        print(f"{name:18} {line}")


@preset_app.command("use")
def preset_use(
    name: Annotated[str, typer.Argument(help="One of `lgp preset list`.")],
    params_file: ParamsFile = DEFAULT_PARAMS,
    force: Annotated[bool, typer.Option("--force", help="Overwrite edits.")] = False,
) -> None:
    """Copy a preset over params.yaml."""
    from lgp import presets

    presets.use(name, params_file, force)
    print(f"{params_file} is now the preset {name}; `dvc repro` runs it")


@app.command(rich_help_panel=TOOLS)
def results(path: Annotated[Path, typer.Argument(help="The table.")] = REPORTS / "results.csv") -> None:
    """Print the results table, and where to look next."""
    from rich.console import Console
    from rich.table import Table

    from lgp.results import read_results, wide_rows

    header, rows = wide_rows(read_results(path))
    table = Table(title="Top-1 accuracy on test, % (± standard deviation over the few-label subsets)")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(f"Report with pictures: {path.with_name('report.md')}. Runs, curves, models: `.venv/bin/lgp ui`.")
    print("Encoders for timm: models/ARM/encoder. Change params.yaml and run `make repro` again.")


@app.command(rich_help_panel=TOOLS)
def ui(
    port: Annotated[int, typer.Option(help="Of the server, on 127.0.0.1.")] = 5000,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Start the MLflow interface on this project's runs."""
    import os

    from lgp.params import load_params
    from lgp.tracking import serve, store_uri

    run = load_params(params_file).run

    def announce() -> None:
        print(f"MLflow starts on http://127.0.0.1:{port} (about 15 s); Ctrl-C ends it.")
        print(f"There: 'Model training' (top left, it opens as 'GenAI'), then Experiments > {run.experiment} > Runs.")
        print(
            "To compare arms: search for tags.task = 'fewshot-1pct', tick the runs, 'Compare'; a click on confusion.png"
        )
        print("under Artifacts shows the pictures side by side. Encoders are under 'Model registry'.", flush=True)

    serve(store_uri(run.tracking_uri, Path(os.environ.get("DVC_ROOT", "."))), port, announce)


if __name__ == "__main__":
    app()
