"""The `lgp` command: the stages of the pipeline, and a few tools around it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lgp.errors import LgpError, is_disk_full
from stages.cl import cl
from stages.conflict import conflict
from stages.fewshot import fewshot
from stages.finetune import finetune
from stages.graft import graft
from stages.import_checkpoint import import_checkpoint
from stages.joint import joint
from stages.linear import linear
from stages.mim import mim
from stages.options import DEFAULT_PARAMS, Arm, ParamsFile
from stages.paths import PREPARED, REPORTS, arm_folder, conflict_file, encoder_folder
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
            # of the processes that torchrun started
            rank = os.environ["RANK"] if "TORCHELASTIC_RUN_ID" in os.environ else "0"
            if isinstance(e, KeyboardInterrupt):
                # a training that was asked to stop says where, and has an exit code of its own
                stopped = str(e) or "stopped: run the same command again, a training goes on from its last state"
                if rank == "0":
                    print(stopped, file=sys.stderr)
                raise typer.Exit(getattr(e, "exit_code", 130)) from None
            print(f"error: {_line(e)}" if rank == "0" else f"error in process {rank}: {_line(e)}", file=sys.stderr)
            raise typer.Exit(1) from None


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and is_disk_full(error):
        return f"disk full while writing {error.filename or 'a file'}: free some space and run again"
    return " ".join(str(error).split())


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(table)


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (prepare, mim, cl, graft, linear, fewshot, finetune, report):
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


app.command(rich_help_panel=TOOLS)(conflict)
app.command("import", rich_help_panel=TOOLS)(import_checkpoint)


@app.command(rich_help_panel=TOOLS)
def export(
    arm: Arm,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="To write, e.g. graft.pth.")],
) -> None:
    """Write an arm's encoder (and MAE decoder) as a .pth in MAE's layout, for tools that expect it."""
    from lgp.checkpoint import load_encoder, load_heads
    from lgp.interchange import export_checkpoint

    tensors = load_encoder(encoder_folder(arm)).state_dict()
    count = export_checkpoint(tensors, load_heads(arm_folder(arm)), file)
    print(f"{file}: {count} tensors under `model`, as MAE names them")


@app.command(rich_help_panel=TOOLS)
def suggest(arm: Arm, params_file: ParamsFile = DEFAULT_PARAMS) -> None:
    """Say where to cut an arm for a graft, from `lgp conflict` and from k-NN accuracy per block."""
    import pandas as pd

    from lgp.conflict import knn_by_block, rates_for, suggest_cut
    from lgp.data.prepared import Prepared
    from lgp.params import load_params
    from lgp.stage import encoder_digest

    params, measured = load_params(params_file), conflict_file(arm)
    if not measured.exists():
        raise LgpError(f"no {measured}: run `lgp conflict {arm}` first")
    table = pd.read_csv(measured)
    if set(table["encoder"]) != {encoder_digest(encoder_folder(arm))}:
        raise LgpError(f"{measured} was measured on another encoder of {arm}: run `lgp conflict {arm}` again")
    knn = knn_by_block(encoder_folder(arm), Prepared(PREPARED), params)
    found = suggest_cut(table, knn)
    rows = [[str(i), f"{c:+.3f}", f"{k:.1f}"] for i, (c, k) in enumerate(zip(found.cosines, knn, strict=True))]
    _print_table(f"Blocks of {arm}", ("block", "median cosine MIM, CL", "k-NN on val, %"), rows)
    by = "conflict grows there" if found.by_conflict else "conflict does not grow with depth, the features decide"
    print(f"keep the lowest {found.lower_blocks} of {len(knn)} blocks ({by}; features are best after {found.by_knn})")
    print(f"  graft.stage_lr.base_lrs: {rates_for(found.lower_blocks, len(knn), 1.5e-5, 1.5e-4)}  # the paper's rates")
    print(f"  or graft.freeze, graft.l1, graft.scratch_end with lower_blocks: {found.lower_blocks}")


@app.command(rich_help_panel=TOOLS)
def plan(
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: Annotated[int | None, typer.Option(min=1, help="To pre-train on; else those that are prepared.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices that share the batch.")] = 1,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB of one device.")] = 80.0,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="10^12 FLOP/s of one device's matrix products; else measured here.")
    ] = None,
    utilization: Annotated[float, typer.Option(min=0.01, max=1, help="Share of these that training reaches.")] = 0.4,
) -> None:
    """Say what the pre-trainings will take: FLOPs, steps, memory, hours."""
    from lgp.data.prepared import Prepared
    from lgp.device import choose_device, choose_precision
    from lgp.params import load_params
    from lgp.plan import Machine, graft_rates_by_part, matrix_tflops
    from lgp.plan import plan as make_plan

    params = load_params(params_file)
    images = images or len(Prepared(PREPARED).pretraining_ids)
    device = choose_device(params.run)
    peak = tflops or matrix_tflops(device, choose_precision(params.run, device, params.model.width))
    plans = make_plan(params, images, Machine(gpus, memory, peak * utilization))
    names = ("stage", "M parameters", "GFLOP/image", "steps", "GiB/GPU", "hours", "GPU-days")
    rows = [
        [
            p.stage,
            f"{p.cost.parameters / 1e6:,.2f}",
            f"{p.cost.flops_per_image / 1e9:,.4g}",
            f"{p.steps:,}",
            f"{p.memory_gib:,.3g}",
            f"{p.hours:,.3g}",
            f"{p.gpu_days:,.3g}",
        ]
        for p in plans
    ]
    _print_table(f"{images:,} images, {gpus} × {peak:.4g} TFLOP/s at {utilization:.0%}", names, rows)
    for warning in (w for p in plans for w in p.warnings):
        print(f"warning: {warning}")
    if "graft" in params.arms:
        header = ("part", "base lr", f"decayed by {params.graft.weight_decay:g}", "not decayed", "frozen")
        groups = graft_rates_by_part(params)
        rows = [[g.part, f"{g.base_lr:.4g}", f"{g.decayed:,}", f"{g.undecayed:,}", f"{g.frozen:,}"] for g in groups]
        _print_table("The graft's parameters", header, rows)


@app.command(rich_help_panel=TOOLS)
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Two sizes and few steps: one or two minutes, else five.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Takes DATE-DEVICE.json and .md.")] = Path("benchmarks"),
) -> None:
    """Measure training steps, views, probing, saving and a pipeline with nothing to do on this machine."""
    from lgp import bench as benchmark

    page = benchmark.write(benchmark.bench(quick), folder)
    print(page.read_text())
    print(f"written to {page} and {page.with_suffix('.json')}")


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
    from lgp.results import read_results, wide_rows

    header, rows = wide_rows(read_results(path))
    _print_table("Top-1 accuracy on test, % (± half the 95 % interval)", header, rows)
    print(f"Report with pictures: {path.with_name('report.md')}. Runs, curves, models: `.venv/bin/lgp ui`.")
    print("Encoders for timm: models/ARM/encoder. Change params.yaml and run `make repro` again.")


@app.command(rich_help_panel=TOOLS)
def ui(
    port: Annotated[int, typer.Option(help="Of the server, on 127.0.0.1.")] = 5000,
    params_file: ParamsFile = DEFAULT_PARAMS,
) -> None:
    """Start the MLflow interface on this project's runs."""
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
