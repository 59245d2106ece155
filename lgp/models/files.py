"""The file names of an arm's folder, the digest of an encoder, and whether it trained. Light: it imports no torch."""

import json
from hashlib import sha256
from pathlib import Path

from lgp.compute.digests import file_digest
from lgp.errors import LgpError
from lgp.params.arms import how_to_get

ENCODER = "encoder"  # a folder of the next three files
WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
HEADS, ARM_METRICS, CURVES = "heads.safetensors", "metrics.json", "curves.csv"
CLASSIFIERS = "classifiers"  # a folder for each evaluation of the arm
RECONSTRUCTIONS = "reconstructions.safetensors"  # only of an arm with a decoder


def encoder_digest(folder: Path) -> str:
    """Return the digest of the weights of an encoder folder. Tracking and caches identify an encoder by it."""
    return file_digest(folder / WEIGHTS)


def classifier_digest(folder: Path) -> str:
    """Return the digest of a classifier folder: of its weights, and of its configuration, which names its classes."""
    return sha256("".join(file_digest(folder / name) for name in (WEIGHTS, CONFIG)).encode()).hexdigest()


def present_encoder_digest(folder: Path) -> str:
    """Return the digest of an encoder folder. Raise `LgpError` if there is no encoder."""
    if not (folder / WEIGHTS).exists():
        raise LgpError(no_encoder(folder))
    return encoder_digest(folder)


def no_encoder(folder: Path) -> str:
    """Return the message that an arm has no encoder folder yet, and how to get one."""
    arm = folder.parent.name
    return f"there is no encoder of arm {arm!r} yet (looked in {folder}): {how_to_get(arm)}"


def check_trained(folder: Path) -> str | None:
    """Return a warning where the checks of an encoder's training failed and the arm was accepted, else None.

    Raises:
        LgpError: the checks failed, and the arm was not accepted. The message says how to accept it.
    """
    file = folder / PROVENANCE
    provenance = json.loads(file.read_text()) if file.exists() else {}
    if provenance.get("metrics", {}).get("trained", True):  # encoders from elsewhere and baselines are not checked
        return None
    arm, faults = folder.parent.name, "; ".join(provenance["checks"]["faults"])
    if not provenance["checks"]["accepted"]:
        raise LgpError(
            f"the arm {arm} did not train ({faults}): train it with other parameters, or take it as it is with "
            f"`lgp {arm} --accept`"
        )
    return f"warning: the arm {arm} did not train ({faults}), and was accepted"
