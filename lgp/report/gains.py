"""What unlabelled images and chosen images add to logistic regression on a few random labels, arm by arm."""

from dataclasses import dataclass

from lgp.evaluate.statistics import CONFIDENCE, Gap, holm, paired_gap
from lgp.params.file import selected_tasks
from lgp.report.outcomes import ArmOutcomes, correct_by_subset, fewest_labels, leader

BASE = "fewshot-"  # logistic regression on random images
# method → the beginning of the sentence that says what it adds
METHODS = {
    "propagated": "Spreading these labels to the unlabelled training images changes",
    "selected": "Choosing which images to label changes",
    "selected and propagated": "Both together change",
}


@dataclass(frozen=True)
class Gain:
    """A method beside logistic regression on random images, with the same encoder and as many labels.

    Attributes:
        arm: the arm.
        labels: the name of the labels.
        method: of `METHODS`.
        task: the task of that method.
        gap: how far it is ahead, on the same test images.
        p: p-value of a tie, adjusted for the methods with the same arm and labels.
    """

    arm: str
    labels: str
    method: str
    task: str
    gap: Gap
    p: float

    @property
    def decided(self) -> bool:
        """Whether the method differs from logistic regression after the correction for the other methods."""
        return self.p < 1 - CONFIDENCE

    def interval(self) -> str:
        """Return the points, and the 95 % interval of this comparison alone."""
        return f"{self.gap.points:+.1f} [{self.gap.low:+.1f}, {self.gap.high:+.1f}]"


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
    here = [gain for gain in found if (gain.arm, gain.labels) == (best.arm, fewest.removeprefix(BASE))]
    said += [
        f"{METHODS[gain.method]} this by {gain.interval()} points{'' if gain.decided else ', undecided'}."
        for gain in here
    ]
    return " ".join(said)


def tasks_of(labels: str) -> dict[str, str]:
    """Return the task of each of `METHODS` with labels of that name."""
    return dict(zip(METHODS, (f"propagate-{labels}", *selected_tasks(labels)), strict=True))


def gains(arms: list[ArmOutcomes]) -> list[Gain]:
    """Compare each method that was measured with logistic regression on random images.

    What the methods add to one encoder with one number of labels is a question of its own: p is adjusted for the
    methods of that row.
    """
    return [
        gain for a in arms for task in a.tasks if task.startswith(BASE) for gain in _of_row(a, task.removeprefix(BASE))
    ]


def _of_row(a: ArmOutcomes, labels: str) -> list[Gain]:
    base = a.tasks[BASE + labels]
    measured = {method: task for method, task in tasks_of(labels).items() if task in a.tasks}
    gaps = [
        paired_gap(*correct_by_subset(a.tasks[task], base, f"{a.arm} in {task} and {BASE}{labels}"))
        for task in measured.values()
    ]
    adjusted = holm([gap.p for gap in gaps])
    return [
        Gain(a.arm, labels, method, task, gap, p)
        for (method, task), gap, p in zip(measured.items(), gaps, adjusted, strict=True)
    ]
