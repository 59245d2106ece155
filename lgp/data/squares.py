"""The images of any source as the squares that an encoder takes: decoded in processes, in order, few at a time."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lgp.compute.processes import cores, pool
from lgp.data.conversion import decode, plain
from lgp.data.sources.offers import Offers, Read
from lgp.data.stored import RESAMPLING, square
from lgp.params.section import Interpolation

CHUNK = 128  # images that are decoded together
FEW = 256  # images for which no process is started


@dataclass(frozen=True)
class Form:
    """What an encoder takes: squares of `size` pixels, from the middle of images whose shorter side is `shorter`."""

    channels: int
    size: int
    shorter: int
    interpolation: Interpolation


def squares(offers: Offers, form: Form, workers: int | None = None) -> Iterator[list[np.ndarray | str]]:
    """Yield the images of a source chunk by chunk, in order: (S, S, C) uint8, or the reason why there is none.

    Args:
        offers: the source.
        form: of the squares.
        workers: processes. None: one per core. Of few images, this process does the work.

    Raises:
        LgpError: a process died.
    """
    reads = offers.reads(range(len(offers)))
    chunks = iter(lambda: list(itertools.islice(reads, CHUNK)), [])
    if len(offers) < FEW:
        yield from (_converted(chunk, form) for chunk in chunks)
        return
    with pool(workers) as processes:
        most = 2 * (workers or cores())
        waiting: deque[Callable[[], list[np.ndarray | str]]] = deque()
        for chunk in chunks:
            waiting.append(processes.submit(_converted, chunk, form).result)
            if len(waiting) == most:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()


def _converted(reads: Sequence[Read], form: Form) -> list[np.ndarray | str]:
    return list(map(partial(_square_of, form=form), reads))


def _square_of(read: Read, form: Form) -> np.ndarray | str:
    try:
        pixels = decode(read(), form.channels)
        return square(pixels, form.shorter, form.size, RESAMPLING[form.interpolation])
    except Exception as error:  # noqa: BLE001 - readers and decoders of damaged files raise any exception
        return plain(error)
