"""How images to label are chosen."""

from enum import StrEnum
from typing import Literal

from lgp.params.section import Section


class Method(StrEnum):
    """How unlabelled images are chosen."""

    TYPICALITY = "typicality"
    COVERAGE = "coverage"
    CENTROID = "centroid"
    MARGIN = "margin"
    RANDOM = "random"


class SelectionParams(Section):
    """Evaluation with few labels of images that were chosen. Those methods can choose that need no label."""

    method: Literal["typicality", "coverage", "centroid", "random"] = "typicality"
