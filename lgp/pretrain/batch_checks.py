"""Checks before an arm trains. They refuse a batch and change no result, so the code digest leaves them out."""

from collections.abc import Mapping

from lgp.compute.distributed import world_size
from lgp.errors import LgpError
from lgp.params.arms import TRAINED
from lgp.params.file import Params


def check_batch(name: str, batch_size: int, images: int, processes: int, accumulate: Mapping[str, int]) -> None:
    """Raise `LgpError` where a batch is larger than the training part, or cannot be cut into equal parts.

    Args:
        name: of the stage.
        batch_size: of the stage.
        images: number of images of the training part.
        processes: number of processes that share a batch.
        accumulate: stage → number of parts of a batch (`run.accumulate`); 1 for a stage that is not in it.
    """
    if batch_size > images:
        raise LgpError(
            f"{name}.batch_size {batch_size} is larger than the {images} images of the training part: "
            "choose at most that"
        )
    parts = processes * accumulate.get(name, 1)
    if batch_size % parts:
        raise LgpError(
            f"{name}.batch_size {batch_size} cannot be cut into {parts} equal parts ({processes} processes, "
            f"run.accumulate {accumulate.get(name, 1)}): choose a multiple of {parts}"
        )


def check_arms(params: Params, images: int) -> None:
    """Raise `LgpError` where a batch of any arm cannot be trained. Each arm checks all arms before it trains.

    Args:
        params: the whole file.
        images: number of images of the training part.
    """
    for arm in TRAINED:
        if arm in params.arms or arm in ("mim", "cl", "graft"):
            check_batch(arm, getattr(params, arm).batch_size, images, world_size(), params.run.accumulate)
