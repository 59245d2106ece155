"""The frame of the pre-training stages: it opens the prepared images, and writes an arm."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stages.paths import LABELS, PREPARED, arm_folder, encoder_files, encoder_folder
from stages.replaying import replaying, with_replay

if TYPE_CHECKING:
    from lgp.params.file import Params
    from lgp.pretrain.arm import Pretrained, Session
    from lgp.workflow.stage import StageRun


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A running pre-training: its inputs, and where its arm goes."""

    run: "StageRun"
    session: "Session"
    folder: Path
    starts: Sequence[Path]
    accept: bool

    def publish(self, result: "Pretrained") -> None:
        """Write the arm, and log its encoder. It is the last act: it ends a stage whose checks failed."""
        from lgp.workflow.publishing import publish_arm

        publish_arm(self.run, self.folder, result, self.session.data, self.starts, self.accept)


@contextmanager
def pretraining(
    arm: str,
    params_file: Path,
    fresh: bool,
    resume: bool,
    accept: bool,
    replay: int | None,
    starts: Sequence[str] = (),
) -> Iterator[Pretraining]:
    """Run the block as the pre-training of `arm`. It starts from the encoders of the arms `starts`, if any.

    `accept` takes the arm even if the checks of its training fail. With `replay` the block ends at this step of the
    training, which is shown, and nothing is written.
    """
    from lgp.workflow.pipeline import SECTIONS
    from lgp.workflow.stage import StageSpec, stage

    starts = sorted(set(starts), key=list(starts).index)
    reads = [PREPARED, *(file for start in starts for file in encoder_files(start))]
    spec = StageSpec(arm, SECTIONS[arm], reads, [arm_folder(arm)], arm, "pretrain", trains=True)
    frame = stage(spec, params_file, fresh, resume) if replay is None else replaying(spec, params_file, fresh, resume)
    with frame as run:
        from lgp.data.storage import Images
        from lgp.features.online_knn import labels_if_any
        from lgp.params.file import load_params
        from lgp.pretrain.arm import Session
        from lgp.pretrain.batch_checks import check_arms
        from lgp.pretrain.batch_size import with_fitting_batches

        data = Images(PREPARED)
        images = len(data.pretraining_ids)
        check_arms(with_fitting_batches(load_params(params_file), images)[0], images)
        params, warnings = with_fitting_batches(run.params, images)
        if arm in warnings:
            print(f"warning: {warnings[arm]}", flush=True)
        folders = [encoder_folder(start) for start in starts]
        if folders:
            run.tag_upstream(folders[0])
        session = Session(data, params, run.store, run.tracker)
        if replay is None:
            session = dataclasses.replace(session, labelled=labels_if_any(PREPARED, LABELS))
            session = _with_ridge(session, load_params(params_file))
        else:
            session = with_replay(session, arm, replay)
        yield Pretraining(run, session, arm_folder(arm), folders, accept)


def _with_ridge(session: "Session", params: "Params") -> "Session":
    """Measure ridge regression with the fewest labels too, where the parameters ask for it and there are any."""
    data, settings = session.labelled, params.run.online_knn
    if data is None or not (settings.every_epochs and settings.ridge):  # else half a second of imports
        return session
    from lgp.compute.device import choose_device
    from lgp.evaluate.online_ridge import OnlineRidge, fewest_labels

    subsets = fewest_labels(data, params.few_labels, settings.train_images)
    if not subsets:
        return session
    return dataclasses.replace(session, more=OnlineRidge(data, subsets, params.fewshot, choose_device(params.run)))
