"""Tool `select`: which unlabelled images to label next."""

from pathlib import Path
from typing import Annotated

import typer

from lgp.params.selection import Method
from stages.arm_features import arm_features
from stages.options import DEFAULT_PARAMS, Debug, OptionalArm, ParamsFile

Budget = Annotated[int, typer.Option(min=1, help="Number of images to choose.")]
How = Annotated[Method, typer.Option("--method", help="How to choose them; margin needs labels.")]
Out = Annotated[Path, typer.Option(help="The CSV to write. A page of the same name shows the images.")]


def select(
    budget: Budget,
    method: How = Method.TYPICALITY,
    arm: OptionalArm = None,
    out: Out = Path("selection.csv"),
    params_file: ParamsFile = DEFAULT_PARAMS,
    debug: Debug = False,
) -> None:
    """Choose unlabelled training images to label next, as a CSV to fill in and a page that shows them."""
    from lgp.evaluate.selection import check_selectable
    from lgp.evaluate.selection import select as select_images
    from lgp.params.file import load_params
    from lgp.report.selection import Origin, check_unfilled, selection_page, selection_table

    params = load_params(params_file)
    check_unfilled(out)
    of = arm_features(arm, params, lambda data: check_selectable(data, method, budget))
    selection = select_images(of.features, method, budget, params.seed, params.fewshot)
    origin, page = Origin(method, params.seed, of.arm, of.encoder), out.with_suffix(".html")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(selection_table(selection, of.data, origin), encoding="utf-8")
    page.write_text(selection_page(selection, of.data, origin, out), encoding="utf-8")
    unlabelled = len(of.data.ids("unlabeled"))
    print(f"select: {budget} of {unlabelled} unlabelled training images, by {method} of the features of {of.arm}")
    print(f"select: {page} shows them; fill in {out}, then `lgp labels add {out}`")
