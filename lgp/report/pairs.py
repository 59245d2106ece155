"""The pairwise table: every two arms in every task, corrected for the number of comparisons."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from lgp.evaluate.statistics import CONFIDENCE, Gap, holm, paired_gap
from lgp.report.outcomes import ArmOutcomes, correct_by_subset


@dataclass(frozen=True)
class Pair:
    """Two arms in one task.

    Attributes:
        task: the task.
        ahead: the arm with the higher accuracy.
        behind: the other arm.
        gap: how far `ahead` is ahead.
        p: p-value of a tie, adjusted for all comparisons of the table.
    """

    task: str
    ahead: str
    behind: str
    gap: Gap
    p: float

    @property
    def beats(self) -> bool:
        """Whether the arm ahead beats the other after the correction for the whole table."""
        return self.p < 1 - CONFIDENCE

    def sentence(self, decided: bool) -> str:
        """Say who beats whom by how much, or that the two are undecided."""
        points = f"{self.gap.points:.1f} points"
        if decided:
            return f"{self.ahead} beats {self.behind} by {points}"
        undecided = f"{self.ahead} and {self.behind} are undecided"
        return f"{undecided}: {self.ahead} is ahead by {points}" if self.gap.points > 0 else f"{undecided}: a tie"

    def interval(self) -> str:
        """Return the 95 % interval of this comparison alone."""
        return f"[{self.gap.low:+.1f}, {self.gap.high:+.1f}]"


def compare(arms: list[ArmOutcomes], left_out: Collection[str] = ()) -> list[Pair]:
    """Compare every two arms in every task on the same subsets and test images.

    Args:
        arms: the arms.
        left_out: tasks that repeat another task.
    """
    found = []
    for task in dict.fromkeys(task for a in arms for task in a.tasks if task not in left_out):
        for a, b in itertools.combinations([x for x in reversed(arms) if task in x.tasks], 2):
            of_a, of_b = correct_by_subset(a.tasks[task], b.tasks[task], f"{a.arm} and {b.arm} in {task}")
            if of_a.mean() >= of_b.mean():
                found.append((task, a.arm, b.arm, paired_gap(of_a, of_b)))
            else:
                found.append((task, b.arm, a.arm, paired_gap(of_b, of_a)))
    return [Pair(*row, p) for row, p in zip(found, holm([gap.p for *_, gap in found]), strict=True)]
