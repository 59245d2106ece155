"""The files of an arm's folder by name, and how to know an encoder again. Light: it imports no torch."""

from pathlib import Path

from lgp.compute.digests import file_digest
from lgp.params.arms import how_to_get

ENCODER = "encoder"  # a folder, which holds the next three
WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
HEADS, METRICS, CURVES = "heads.safetensors", "metrics.json", "curves.csv"
RECONSTRUCTIONS = "reconstructions.safetensors"  # where the arm has a decoder


def encoder_digest(folder: Path) -> str:
    """Digest the weights of an encoder folder. Tracking and caches know an encoder by it."""
    return file_digest(folder / WEIGHTS)


def no_encoder(folder: Path) -> str:
    """Say that an arm has no encoder folder yet, and how it gets one."""
    arm = folder.parent.name
    return f"there is no encoder of arm {arm!r} yet (looked in {folder}): {how_to_get(arm)}"
