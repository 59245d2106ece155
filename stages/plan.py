"""Tool `plan`: the cost of the pre-trainings."""

from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, ParamsFile
from stages.paths import PREPARED

Images = Annotated[int | None, typer.Option(min=1, help="Number of images to pre-train on; default: as prepared.")]
Gpus = Annotated[int, typer.Option(min=1, help="Devices that share the batch.")]
Memory = Annotated[float, typer.Option(min=0.1, help="GiB of one device.")]
Tflops = Annotated[
    float | None,
    typer.Option(min=1e-6, help="10^12 FLOP/s of one device's matrix products; default: measured on this machine."),
]
Utilization = Annotated[float, typer.Option(min=0.01, max=1, help="Fraction of these FLOP/s that training reaches.")]


def plan(
    params_file: ParamsFile = DEFAULT_PARAMS,
    images: Images = None,
    gpus: Gpus = 1,
    memory: Memory = 80.0,
    tflops: Tflops = None,
    utilization: Utilization = 0.4,
) -> None:
    """Print the cost of the pre-trainings: FLOPs, steps, memory, time."""
    from lgp.compute.device import choose_device
    from lgp.compute.precision import choose_precision
    from lgp.data.storage import Images as PreparedImages
    from lgp.errors import LgpError
    from lgp.params.file import load_params
    from lgp.pretrain.plan import GRAFT_COLUMNS, PLAN_COLUMNS, Machine, graft_rows, matrix_tflops, plan_row
    from lgp.pretrain.plan import plan as make_plan
    from lgp.report.terminal import print_table

    params = load_params(params_file)
    if not images and not PREPARED.exists():
        raise LgpError("no prepared images to count: say how many with --images, or run `lgp prepare` first")
    images = images or len(PreparedImages(PREPARED).pretraining_ids)
    device = choose_device(params.run)
    peak = tflops or matrix_tflops(device, choose_precision(params.run, device, params.model.width))
    plans = make_plan(params, images, Machine(gpus, memory, peak * utilization))
    title = f"{images:,} images, {gpus} × {peak:.4g} TFLOP/s at {utilization:.0%}"
    print_table(title, PLAN_COLUMNS, [plan_row(p) for p in plans])
    for warning in (w for p in plans for w in p.warnings):
        print(f"warning: {warning}")
    if "graft" in params.arms:
        print_table("The graft's parameters", GRAFT_COLUMNS, graft_rows(params))
