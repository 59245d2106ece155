"""The file names of an arm's folder, and the digest of an encoder. Light: it imports no torch."""

from pathlib import Path

from lgp.compute.digests import file_digest
from lgp.params.arms import how_to_get

ENCODER = "encoder"  # a folder of the next three files
WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
HEADS, ARM_METRICS, CURVES = "heads.safetensors", "metrics.json", "curves.csv"
RECONSTRUCTIONS = "reconstructions.safetensors"  # only of an arm with a decoder


def encoder_digest(folder: Path) -> str:
    """Return the digest of the weights of an encoder folder. Tracking and caches identify an encoder by it."""
    return file_digest(folder / WEIGHTS)


def no_encoder(folder: Path) -> str:
    """Return the message that an arm has no encoder folder yet, and how to get one."""
    arm = folder.parent.name
    return f"there is no encoder of arm {arm!r} yet (looked in {folder}): {how_to_get(arm)}"
