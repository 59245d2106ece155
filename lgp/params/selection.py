"""The methods of `lgp select`."""

from enum import StrEnum


class Method(StrEnum):
    """How unlabelled images are chosen."""

    TYPICALITY = "typicality"
    COVERAGE = "coverage"
    CENTROID = "centroid"
    MARGIN = "margin"
    RANDOM = "random"
