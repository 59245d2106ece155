"""Tool `data inspect`: what a data source has, what to set for it, and how long it takes."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug, ParamsFile
from stages.paths import REPORTS

if TYPE_CHECKING:
    from lgp.data.inspection import Inspection
    from lgp.params.file import Params

data_app = typer.Typer(help="Look at images before anything is prepared.", no_args_is_help=True)
Source = Annotated[str | None, typer.Argument(metavar="SOURCE", help="A data source; default: data.source.")]
Write = Annotated[bool, typer.Option("--write", help="Write fitting parameters; the old file is kept.")]
Minutes = Annotated[float, typer.Option(min=0.1, help="For the pre-training of mim, cl and graft together.")]
Sample = Annotated[int, typer.Option(min=1, help="Number of images to decode, evenly spaced.")]
SHEET = REPORTS / "inspect.jpg"


@data_app.command("inspect")
def data_inspect(
    source: Source = None,
    write: Write = False,
    minutes: Minutes = 30.0,
    sample: Sample = 2000,
    params_file: ParamsFile = DEFAULT_PARAMS,
    debug: Debug = False,
) -> None:
    """Say what a data source has, what will go wrong, and which parameters suit it."""
    from lgp.data.contact_sheet import contact_sheet
    from lgp.data.inspection import inspect
    from lgp.data.sources.opening import open_sources
    from lgp.errors import LgpError
    from lgp.params.editing import with_values
    from lgp.params.file import load_params
    from lgp.report.inspection import print_inspection

    own = load_params(params_file)
    if source:
        own = with_values(own, {"data.source": source})
    offers = open_sources(own.data.source, own.data.columns, own.data.labels)
    found = inspect(offers, own.data, sample)
    print_inspection(found)
    if not found.images:
        raise LgpError("; ".join(found.faults))
    SHEET.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(offers, found.sample.channels).save(SHEET, quality=90)
    print(f"{SHEET} shows some images of each class")
    if not found.sample.modes or not found.parts["train"]:
        raise LgpError("; ".join(found.faults) or "no image of the sample can be read: mend data.source")
    _advise(found, own, minutes, params_file, write)


def _advise(found: "Inspection", own: "Params", minutes: float, params_file: Path, write: bool) -> None:
    """Print advice and the expected time, and write or print the proposed parameters."""
    started = time.perf_counter()
    from lgp.compute.device import choose_device
    from lgp.data.advice import advise
    from lgp.evaluate.validation import small_validation
    from lgp.params.editing import as_written, with_values
    from lgp.params.file import load_params
    from lgp.pretrain.expected_time import expected_minutes
    from lgp.pretrain.proposal import kept_values, preset_for, propose
    from lgp.pretrain.speed import images_per_second
    from lgp.report.inspection import expected_line
    from lgp.workflow.presets import FOLDER, adopt

    start_s = time.perf_counter() - started
    cuda = choose_device(own.run).type == "cuda"
    preset = preset_for(found)
    base = load_params(FOLDER / f"{preset}.yaml")
    kept = kept_values(own, base)
    proposal = propose(found, minutes, with_values(base, kept), cuda, images_per_second)
    warning = small_validation(found.parts["val"]) if found.train_labels else ""
    for line in [*advise(found, proposal.params if write else own, cuda), *filter(None, [warning]), *proposal.notes]:
        print(f"advice: {line}")
    expected = expected_minutes(proposal.params, found, proposal.speeds, proposal.minutes, start_s)
    if write:
        before = adopt(preset, params_file, {**kept, **proposal.values})
        print(f"{params_file} is the preset {preset}, fitted to these images; {before} is the old one")
    else:
        print(f"`lgp data inspect --write` writes the preset {preset} with:")
        print("\n".join(f"  {key}: {as_written(value)}" for key, value in {**kept, **proposal.values}.items()))
    print(f"then {expected_line(expected)}")
