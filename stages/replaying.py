"""The frame of a replay: a pre-training runs up to one of its steps, which is shown. Nothing is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lgp.errors import LgpError, escaped

if TYPE_CHECKING:
    from lgp.pretrain.arm import Session
    from lgp.training.replay import Seen
    from lgp.workflow.stage import StageRun, StageSpec


@contextmanager
def replaying(spec: "StageSpec", params_file: Path, fresh: bool, resume: bool) -> Iterator["StageRun"]:
    """Run the block as a stage that writes and logs nothing. Print what was seen at the step where it ends."""
    from lgp.compute.launch import launched
    from lgp.training.replay import Replayed
    from lgp.workflow.stage import unrecorded

    if fresh or resume:
        raise LgpError("--replay reads the states that are there and changes none: leave out --fresh and --resume")
    if launched():
        raise LgpError("--replay runs in one process: call it without torchrun")
    with unrecorded(spec, params_file) as run:
        try:
            yield run
        except Replayed as e:
            show(e.seen)


def with_replay(session: "Session", arm: str, step: int) -> "Session":
    """Return the inputs of a pre-training that ends at a step. Raise `LgpError` if the training has no such step."""
    from lgp.training.replay import Replay

    section = getattr(session.params, arm)
    if section is None:  # which the training refuses
        return session
    steps = section.epochs * (len(session.data.pretraining_ids) // section.batch_size)
    return replace(session, fit=Replay(arm, step, steps).fit)


def show(seen: "Seen") -> None:
    """Print the images of a step, a line each, and a table of what was seen."""
    from lgp.report.terminal import print_table

    for image, path in seen.images:
        print(f"image {image}  {escaped(path)}")
    print_table(f"{seen.training}, step {seen.step}", ("what", "value"), seen.rows())
