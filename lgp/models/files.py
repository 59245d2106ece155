"""The files of an arm's folder: names, seals, digests, and whether the encoder trained. Light: it imports no torch."""

from hashlib import sha256
from pathlib import Path
from typing import Any

from lgp.compute.digests import file_digest
from lgp.compute.intact import read_json, read_record
from lgp.compute.seals import check_sealed, seal
from lgp.errors import LgpError
from lgp.params.arms import how_to_evaluate, how_to_get

ENCODER = "encoder"  # a folder of the next three files
WEIGHTS, CONFIG, PROVENANCE = "model.safetensors", "config.json", "provenance.json"
HEADS, ARM_METRICS, CURVES = "heads.safetensors", "metrics.json", "curves.csv"
LAST = "last"  # in an encoder folder that has an average: the encoder of the last step, a folder of the same files
CLASSIFIERS = "classifiers"  # a folder for each evaluation of the arm
RECONSTRUCTIONS = "reconstructions.safetensors"  # only of an arm with a decoder
WEIGHT_FILES = (WEIGHTS, "pytorch_model.bin")  # of another project, in a folder of timm or Hugging Face
REMOTE = ("timm:", "hf-hub:")  # how a name begins that timm fetches


def how_to_make(folder: Path) -> str:
    """Return the instruction to make an encoder folder or a classifier folder, as text for a message."""
    if folder.name == LAST:
        folder = folder.parent
    if folder.parent.name == CLASSIFIERS:
        return how_to_evaluate(folder.parent.parent.name, folder.name)
    return how_to_get(folder.parent.name)


def is_remote(checkpoint: Path) -> bool:
    """Return whether timm fetches a checkpoint: `timm:NAME` or `hf-hub:NAME`."""
    return str(checkpoint).startswith(REMOTE)


def weights_at(path: Path) -> Path:
    """Return the file of a checkpoint: the path, or what a folder of timm or Hugging Face has.

    Raises:
        LgpError: there is none.
    """
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), path)
    if not found.is_file():
        raise LgpError(
            f"no file {path}: give a checkpoint (.pth, .pth.tar, .pt or .safetensors), a folder with "
            f"{' or '.join(WEIGHT_FILES)}, timm:NAME or hf-hub:NAME"
        )
    return found


def seal_arm(arm: Path) -> None:
    """Seal the encoder of an arm, with the files beside it."""
    beside = (arm / name for name in (HEADS, ARM_METRICS, CURVES, RECONSTRUCTIONS))
    seal(arm / ENCODER)
    seal(arm / ENCODER, [f"../{file.name}" for file in beside if file.exists()])


def check_beside(arm: Path, name: str) -> None:
    """Raise `Damaged` unless a file beside the encoder of an arm is as it was sealed."""
    check_sealed(arm / ENCODER, how_to_get(arm.name), [f"../{name}"])


def read_arm_metrics(arm: Path) -> dict[str, Any]:
    """Read the metrics of a pre-training. Raise `Damaged` if they are missing or damaged."""
    check_beside(arm, ARM_METRICS)
    return read_record(arm / ARM_METRICS, dict[str, Any], how_to_get(arm.name))


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read the provenance of an encoder or a classifier; nothing where it is not there. Raise `Damaged` if it is."""
    if not (folder / PROVENANCE).exists():
        return {}
    check_sealed(folder, how_to_make(folder), [PROVENANCE])
    provenance: dict[str, Any] = read_json(folder / PROVENANCE, dict[str, Any], how_to_make(folder))
    return provenance


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
        LgpError: the encoder is damaged, or the checks failed and the arm was not accepted. The message says how to
            accept it.
    """
    check_sealed(folder, how_to_make(folder))
    provenance = read_provenance(folder)
    if provenance.get("metrics", {}).get("trained", True):  # encoders from elsewhere and baselines are not checked
        return None
    arm, faults = folder.parent.name, "; ".join(provenance["checks"]["faults"])
    if not provenance["checks"]["accepted"]:
        raise LgpError(
            f"the arm {arm} did not train ({faults}): train it with other parameters, or take it as it is with "
            f"`lgp {arm} --accept`"
        )
    return f"warning: the arm {arm} did not train ({faults}), and was accepted"
