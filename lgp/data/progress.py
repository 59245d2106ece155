"""A line in the terminal: images, rate and time left."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show images, rate and time left inside the block, where standard error is a terminal. Yield what counts more."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("[bold]{task.description}", BarColumn(), "{task.fields[numbers]}", "left", TimeRemainingColumn())
    shown = (TextColumn(c) if isinstance(c, str) else c for c in columns)
    # without a thread of its own, which forked processes would not have
    with Progress(*shown, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("images", total=total, completed=done, numbers="")
        started = latest = time.monotonic()
        now_done = done

        def advance(images: int) -> None:
            nonlocal now_done, latest
            now_done += images
            now = time.monotonic()
            if now - latest >= 0.5 or now_done == total:
                latest = now
                rate = (now_done - done) / max(now - started, 1e-9)
                bar.update(task, completed=now_done, numbers=f"{now_done:,}/{total:,}  {rate:,.0f} images/s")
                bar.refresh()

        yield advance
