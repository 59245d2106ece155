"""The progress of a long stage: a bar in a terminal, a plain line at intervals elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Shows epoch, loss, images per second and time left of one training."""

    def __init__(
        self, name: str, epochs: int, steps_per_epoch: int, batch_size: int, first: int, every_s: float | None
    ) -> None:
        """Begin at step `first`. Outside a terminal, print a line at most every `every_s` seconds (None: never)."""
        self.name, self.epochs, self.steps_per_epoch, self.batch_size = name, epochs, steps_per_epoch, batch_size
        self.first, self.every_s = first, every_s
        self.started = self._printed = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show the bar inside the block, where standard output is a terminal."""
        if self.every_s is None or not sys.stdout.isatty():
            yield
            return
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = ("[bold]{task.description}", BarColumn(), "{task.fields[numbers]}", "left", TimeRemainingColumn())
        with Bar(*(TextColumn(c) if isinstance(c, str) else c for c in columns)) as self._bar:
            total = self.epochs * self.steps_per_epoch
            self._task = self._bar.add_task(self.name, total=total, completed=self.first, numbers="")
            yield

    def step(self, done: int, loss: float | None) -> None:
        """Show that `done` steps of the training are over. `loss` is the latest known loss."""
        if self.every_s is None:
            return
        now = time.monotonic()
        rate = (done - self.first) * self.batch_size / max(now - self.started, 1e-9)
        epoch = min(-(-done // self.steps_per_epoch), self.epochs)
        loss_text = "" if loss is None else f"loss {loss:.4f}  "
        numbers = f"epoch {epoch}/{self.epochs}  {loss_text}{rate:,.0f} images/s"
        total = self.epochs * self.steps_per_epoch
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=numbers)
        elif done == total or now - self._printed >= self.every_s:
            self._printed = now
            left = (total - done) * self.batch_size / max(rate, 1e-9)
            print(f"{self.name}: {numbers}  left {int(left // 60)}:{int(left % 60):02d}", flush=True)
