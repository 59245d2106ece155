"""Stage `baseline`: the untrained arms, raw pixels and an encoder with random weights."""

from typing import Annotated

import typer

from stages.options import DEFAULT_PARAMS, Debug, Fresh, ParamsFile
from stages.paths import PREPARED, arm_folder

Baseline = Annotated[str, typer.Argument(metavar="NAME", help="pixels or random.")]


def baseline(
    name: Baseline, params_file: ParamsFile = DEFAULT_PARAMS, fresh: Fresh = False, debug: Debug = False
) -> None:
    """Write the arm `pixels` or `random`, which any encoder must beat."""
    from lgp.errors import LgpError
    from lgp.params.arms import BASELINES
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    if name not in BASELINES:
        raise LgpError(f"no baseline {name!r}: there are {', '.join(BASELINES)}")
    folder = arm_folder(name)
    spec = StageSpec("baseline", SECTIONS["baseline"], [PREPARED], [folder], name, "pretrain")
    with stage(spec, params_file, fresh) as run:
        from lgp.data.storage import Images
        from lgp.pretrain.baselines import baseline_encoder
        from lgp.workflow.publishing import publish_baseline

        publish_baseline(run, folder, baseline_encoder(name, run.params), Images(PREPARED))
