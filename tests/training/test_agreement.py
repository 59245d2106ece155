"""When the processes of a training ask one another whether to go on."""

import time

import pytest

from lgp.training import agreement
from lgp.training.agreement import Agreement


class Others:
    """Stands for the other processes and the clock: a step takes `a_step` seconds here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, a_step: float, others: list[int] | None) -> None:
        self.now, self.a_step, self.others, self.told = 0.0, a_step, others, list[list[int]]()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(agreement, "world_size", lambda: 1 if others is None else 2)
        monkeypatch.setattr(agreement, "agree_on", self.agree_on)

    def agree_on(self, own: list[int]) -> list[int]:
        self.told.append(own)
        return own if self.others is None else [max(pair) for pair in zip(own, self.others, strict=True)]

    def steps(self, last: int, first: int = 0) -> list[int]:
        """Return the steps of a training after which there was an exchange."""
        training, asked = Agreement(first), []
        for step in range(first + 1, last + 1):
            self.now += self.a_step
            if training.is_due(step):
                training.reach(step, 0)
                asked.append(step)
        return asked


@pytest.mark.parametrize(
    ("a_step", "asked"),
    [
        (0.001, [1, 21, 41]),  # at most every 20 steps
        (0.125, [1, 9, 17, 25, 33]),  # once a second
        (0.3, [1, 4, 7]),
        (0.75, [1, 2, 3]),
        (90.0, [1, 2, 3]),
    ],
)
def test_processes_ask_once_a_second_and_every_twenty_steps_at_least(
    monkeypatch: pytest.MonkeyPatch, a_step: float, asked: list[int]
) -> None:
    assert Others(monkeypatch, a_step, [0, -20]).steps(45)[: len(asked)] == asked
    assert Others(monkeypatch, a_step, [0, -20]).steps(105, first=60)[: len(asked)] == [60 + step for step in asked]


def test_slowest_process_says_when_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Others(monkeypatch, 0.001, [0, -4])
    assert quick.steps(10) == [1, 5, 9]
    assert quick.told == [[0, -20]] * 3


def test_process_alone_is_asked_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Others(monkeypatch, 0.001, None).steps(5) == [1, 2, 3, 4, 5]


def test_pace_is_that_of_the_steps_since_the_last_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    others, training = Others(monkeypatch, 0.0, [0, -20]), Agreement(0)
    others.now = 10.0
    training.reach(1, 2)
    others.now = 12.0  # 8 steps of a quarter of a second
    assert training.reach(9, 1) == 1
    assert others.told == [[2, -1], [1, -4]]
    assert [training.is_due(step) for step in (12, 13, 14)] == [False, True, True]
