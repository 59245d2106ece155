"""What unlabelled images and chosen images add to a classifier of a few random labels, arm by arm.

Label propagation and selection are compared with logistic regression, semi-supervised fine-tuning with fine-tuning.
"""

from dataclasses import dataclass

from lgp.evaluate.statistics import CONFIDENCE, Gap, holm, paired_gap
from lgp.params.file import selected_tasks
from lgp.report.outcomes import ArmOutcomes, correct_by_subset, fewest_labels, leader

BASE = "fewshot-"  # logistic regression on random images
TUNED = "finetune-"  # fine-tuning on random images
SEMI = "semi-supervised"
# method → the beginning of the sentence that says what it adds
METHODS = {
    "propagated": "Spreading these labels to the unlabelled training images changes",
    "selected": "Choosing which images to label changes",
    "selected and propagated": "Both together change",
}
COLUMNS = (*METHODS, SEMI)


@dataclass(frozen=True)
class Gain:
    """A method beside a classifier of random images, with the same encoder and as many labels.

    Attributes:
        arm: the arm.
        base: the task of that classifier.
        method: of `COLUMNS`.
        task: the task of that method.
        gap: how far it is ahead, on the same test images.
        p: p-value of a tie, adjusted for the methods with the same arm and labels.
    """

    arm: str
    base: str
    method: str
    task: str
    gap: Gap
    p: float

    @property
    def decided(self) -> bool:
        """Whether the method differs from its base after the correction for the other methods."""
        return self.p < 1 - CONFIDENCE


def answer(arms: list[ArmOutcomes], found: list[Gain]) -> str:
    """Say how good the leader is with the fewest labels and with all, and what the methods add; nothing without one.

    Args:
        arms: outcomes of all arms.
        found: all gains.
    """
    best = leader(arms)
    if best is None:
        return ""
    fewest = fewest_labels(arms)
    few, linear = best.tasks[fewest].metrics, best.tasks["linear"].metrics
    said = [
        f"With {few['labels']:,.0f} labels, {best.arm} gets {few['test/top1']:.1f} % of the test images right "
        f"[{few['test/top1_low']:.1f}, {few['test/top1_high']:.1f}]; with all {linear['labels']:,.0f} labels, "
        f"{linear['test/top1']:.1f} %."
    ]
    here = [gain for gain in found if (gain.arm, gain.base) == (best.arm, fewest)]
    said += [
        f"{METHODS[gain.method]} this by {gain.gap.signed()} points{'' if gain.decided else ', undecided'}."
        for gain in here
    ]
    return " ".join(said)


def tasks_of(base: str) -> dict[str, str]:
    """Return the task of each method that is compared with the task `base`."""
    labels = base.partition("-")[2]
    if base.startswith(TUNED):
        return {SEMI: f"semi-{labels}"}
    if base.startswith(BASE):
        return dict(zip(METHODS, (f"propagate-{labels}", *selected_tasks(labels)), strict=True))
    return {}


def gains(arms: list[ArmOutcomes]) -> list[Gain]:
    """Compare each method that was measured with its base: logistic regression or fine-tuning on random images.

    What the methods add to one encoder with one number of labels is a question of its own: p is adjusted for the
    methods of that row.
    """
    return [gain for a in arms for task in a.tasks for gain in _of_row(a, task)]


def _of_row(a: ArmOutcomes, base: str) -> list[Gain]:
    measured = {method: task for method, task in tasks_of(base).items() if task in a.tasks}
    gaps = [
        paired_gap(*correct_by_subset(a.tasks[task], a.tasks[base], f"{a.arm} in {task} and {base}"))
        for task in measured.values()
    ]
    adjusted = holm([gap.p for gap in gaps])
    return [
        Gain(a.arm, base, method, task, gap, p)
        for (method, task), gap, p in zip(measured.items(), gaps, adjusted, strict=True)
    ]
