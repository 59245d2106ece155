"""The frame of the evaluation stages: it opens encoder, images and labels, and writes metrics and predictions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.paths import LABELS, PREPARED, encoder_files, encoder_folder, heads_file, metrics_file, predictions_file

if TYPE_CHECKING:
    from lgp.data.labels import LabelledImages
    from lgp.evaluate.outcome import Outcome
    from lgp.pretrain.arm import Session
    from lgp.workflow.stage import StageRun


@dataclass(frozen=True)
class Evaluation:
    """A running evaluation: its inputs, and where its outcome goes."""

    run: "StageRun"
    data: "LabelledImages"
    encoder: Path
    arm: str
    task: str

    @property
    def session(self) -> "Session":
        """The inputs of a training in the evaluation."""
        from lgp.pretrain.arm import Session

        return Session(self.data, self.run.params, self.run.store, self.run.tracker)

    def publish(self, outcome: "Outcome") -> None:
        """Write metrics and predictions, and log both."""
        from lgp.workflow.publishing import publish_outcome

        metrics, predictions = metrics_file(self.arm, self.task), predictions_file(self.arm, self.task)
        publish_outcome(self.run, self.encoder, metrics, predictions, outcome, self.data.classes)


@contextmanager
def evaluation(
    arm: str, task: str, sections: Sequence[str], params_file: Path, fresh: bool, resume: bool = False
) -> Iterator[Evaluation]:
    """Run the block as the evaluation `task` of `arm`. Fine-tuning is a training, and also reads the arm's heads."""
    from lgp.workflow.stage import StageSpec, stage

    encoder, name = encoder_folder(arm), task.partition("-")[0]
    trains = name == "finetune"
    reads = [PREPARED, LABELS, *encoder_files(arm), *([heads_file(arm)] if trains else [])]
    writes = [metrics_file(arm, task), predictions_file(arm, task)]
    with stage(StageSpec(name, sections, reads, writes, arm, task, trains), params_file, fresh, resume) as run:
        from lgp.data.labels import LabelledImages

        run.tag_upstream(encoder)
        yield Evaluation(run, LabelledImages(PREPARED, LABELS), encoder, arm, task)
