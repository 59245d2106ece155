"""Stage `inputs`: what DVC cannot see by itself, as files: the code of each stage, and the state of the labels."""

import os
from pathlib import Path

from stages.options import DEFAULT_PARAMS, ParamsFile
from stages.paths import INPUTS


def inputs(params_file: ParamsFile = DEFAULT_PARAMS) -> None:
    """Digest the code of each stage and the state of labels and lists, for DVC to compare. It always runs."""
    from lgp.workflow.inputs import write_inputs

    write_inputs(INPUTS, params_file, Path(os.environ.get("DVC_ROOT", ".")))
