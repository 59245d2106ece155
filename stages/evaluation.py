"""The frame of the evaluation stages: it opens encoder, images and labels, and writes the outcome."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.paths import (
    LABELS,
    PREPARED,
    classifier_folder,
    encoder_files,
    encoder_folder,
    heads_file,
    metrics_file,
    predictions_file,
)

if TYPE_CHECKING:
    from lgp.data.labels import LabelledImages
    from lgp.evaluate.outcome import Outcome
    from lgp.pretrain.arm import Session
    from lgp.workflow.stage import StageRun, StageSpec


@dataclass(frozen=True)
class Evaluation:
    """A running evaluation: its inputs, and where its outcome goes."""

    run: "StageRun"
    data: "LabelledImages"
    encoder: Path
    arm: str
    task: str
    fresh: bool

    @property
    def session(self) -> "Session":
        """The inputs of a training in the evaluation."""
        from lgp.pretrain.arm import Session

        return Session(self.data, self.run.params, self.run.store, self.run.tracker)

    def outcome(self, labels: str, settings: Sequence[Any], compute: Callable[[], "Outcome"]) -> "Outcome":
        """Return the outcome of `compute`, or one that another name of the same images already has.

        Several processes that share a training always compute, and so does a training that other code began.

        Args:
            labels: name of the labels.
            settings: plain values, without the name of the labels: the parameters that decide the outcome.
            compute: evaluates.
        """
        from lgp.compute.launch import launched

        names = self.data.names_of_same_subsets(labels)
        if len(names) < 2 or launched() or "resumed_from_code" in self.run.provenance:
            return compute()
        from lgp.compute.device import choose_device
        from lgp.evaluate.kept_outcomes import KEPT, KeptOutcome

        settings_of_run = self.run.params.run
        computed = [settings_of_run.model_dump(mode="json"), choose_device(settings_of_run).type]
        digests = [self.run.provenance["digests"][kind] for kind in ("inputs", "code")]
        subsets = [ids.tolist() for ids in self.data.subsets(labels)]
        file = Path(os.environ.get("DVC_ROOT", ".")) / KEPT / f"{self.arm}-{self.run.spec.name}-{names[0]}.parquet"
        kept = KeptOutcome(file, [digests, list(settings), computed, subsets])
        found = None if self.fresh else kept.of_another_name(labels)
        if found:
            print(f"{self.arm} / {self.task}: the same images as {found[0]}, whose outcome is taken", flush=True)
            return found[1]
        outcome = compute()
        kept.keep(labels, outcome)
        return outcome

    def publish(self, outcome: "Outcome") -> None:
        """Write metrics, predictions and the classifier. Warn of a validation part that is too small to choose by."""
        from lgp.evaluate.validation import small_validation
        from lgp.workflow.publishing import Places, publish_outcome

        publish_outcome(self.run, self.encoder, Places(*_places(self.arm, self.task)), outcome, self.data.classes)
        if warning := small_validation(len(self.data.ids("val"))):
            print(f"warning: {warning}", flush=True)


def check_labels(labels: str) -> None:
    """Raise `LgpError` for an unknown name of few labels, before any work."""
    from lgp.data.subset_files import load_subsets
    from lgp.params.labels import ALL_LABELS

    if labels != ALL_LABELS:
        load_subsets(LABELS, labels)


@contextmanager
def evaluation(
    arm: str,
    task: str,
    sections: Sequence[str],
    params_file: Path,
    fresh: bool,
    resume: bool = False,
    also: Sequence[Path] = (),
) -> Iterator[Evaluation]:
    """Run the block as the evaluation `task` of `arm`. Fine-tuning is a training, and also reads the arm's heads.

    `also` are more files that it reads.
    """
    from lgp.workflow.stage import stage

    encoder = encoder_folder(arm)
    with stage(spec_of(arm, task, sections, also), params_file, fresh, resume) as run:
        from lgp.data.labels import LabelledImages

        run.tag_upstream(encoder)
        data = LabelledImages(PREPARED, LABELS)
        data.check_evaluable()
        yield Evaluation(run, data, encoder, arm, task, fresh)


def spec_of(arm: str, task: str, sections: Sequence[str], also: Sequence[Path] = ()) -> "StageSpec":
    """Describe the evaluation `task` of `arm` as a stage. `also` are more files that it reads."""
    from lgp.params.arms import TUNING
    from lgp.workflow.ahead import folder_ahead
    from lgp.workflow.stage import StageSpec

    name = task.partition("-")[0]
    trains = name in TUNING
    reads = [PREPARED, LABELS, *encoder_files(arm), *([heads_file(arm)] if trains else []), *also]
    return StageSpec(name, sections, reads, _places(arm, task), arm, task, trains, folder_ahead(arm, task))


def _places(arm: str, task: str) -> list[Path]:
    """Return the outputs: metrics, predictions, classifier."""
    return [metrics_file(arm, task), predictions_file(arm, task), classifier_folder(arm, task)]
