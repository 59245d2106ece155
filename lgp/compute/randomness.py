"""Counted randomness: every random choice is a pure function of the seed and its place in the run.

Nothing draws from a global generator that other code could have advanced. A resumed training therefore needs no
generator states. Any number of loader workers or processes gets the same batches.
"""

import contextlib
import random
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch


def counted_seed(seed: int, *place: str | int) -> int:
    """Mix `seed` with the place of a random choice, e.g. `("mim/mask", step)`, into 63 bits.

    Words are hashed by CRC-32. Numbers are used unchanged. `numpy.random.SeedSequence` mixes all of them, so that
    neighbouring places give unrelated streams.
    """
    words = [zlib.crc32(p.encode()) if isinstance(p, str) else p for p in place]
    # the length is mixed in too: SeedSequence gives the same for (1, 2) and (1, 2, 0)
    high, low = np.random.SeedSequence([len(words), seed, *words]).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def generator(seed: int, *place: str | int) -> torch.Generator:
    """Return a CPU generator for one place. Its draws are the same for every device."""
    return torch.Generator().manual_seed(counted_seed(seed, *place))


@contextlib.contextmanager
def seeded(seed: int, *place: str | int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python inside the block only.

    Layer constructors and drop path draw from torch's generator. timm's augmentations draw from all three.
    """
    value = counted_seed(seed, *place)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(value)
            random.seed(value)
            np.random.seed(value % 2**32)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@dataclass(frozen=True)
class Stream:
    """The random choices of one training: the run's seed, and a name that separates them from other trainings'."""

    seed: int
    name: str

    def generator(self, kind: str, *place: int) -> torch.Generator:
        """Return a CPU generator for the choices of one kind (`order`, `crops`, `mask`, …) at one place."""
        return generator(self.seed, f"{self.name}/{kind}", *place)

    def seeded(self, kind: str, *place: int) -> AbstractContextManager[None]:
        """Seed the global generators inside the block, for the choices of one kind at one place."""
        return seeded(self.seed, f"{self.name}/{kind}", *place)
