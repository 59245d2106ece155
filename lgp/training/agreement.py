"""When the processes of a training tell one another whether to go on, to save or to stop."""

import time

from lgp.compute.distributed import agree_on, world_size

EVERY_STEPS = 20  # at most; an exchange makes the fastest process wait for the slowest
WITHIN_S = 1.0  # between two exchanges of slow steps


class Agreement:
    """Exchanges the requests of all processes every few steps, after the same step in all of them.

    With their requests they agree on the step of the next exchange: after `WITHIN_S` at the pace of the slowest
    process, and after `EVERY_STEPS` steps at most. A process alone is asked after each step.
    """

    def __init__(self, step: int) -> None:
        """Begin after `step` steps. The first exchange is after one more."""
        self._step, self._next, self._at = step, step + 1, time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether an exchange is due after so many steps. All processes get the same answer."""
        return step >= self._next

    def reach(self, step: int, request: int) -> int:
        """Return the largest request of all processes. All of them must call this after the same step."""
        now = time.monotonic()
        a_step = max(now - self._at, 1e-9) / (step - self._step)
        wait = 1 if world_size() == 1 else min(max(int(WITHIN_S / a_step), 1), EVERY_STEPS)
        largest, shortest = agree_on([request, -wait])
        self._step, self._next, self._at = step, step - shortest, now
        return largest
