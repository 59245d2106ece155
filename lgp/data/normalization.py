"""The statistics by which an encoder's input is normalised. They travel with the encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgp.errors import LgpError, escaped


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Normalization":
        """Take `mean` and `std` from a record: the `meta.json` of prepared images, or timm's `pretrained_cfg`."""
        return cls(tuple(map(float, record["mean"])), tuple(map(float, record["std"])))

    def is_possible(self) -> bool:
        """Return whether pixels in [0, 1] can have these statistics."""
        within = all(0 <= mean <= 1 for mean in self.mean) and all(0 < std <= 1 for std in self.std)
        return within and len(self.mean) == len(self.std) > 0

    def __str__(self) -> str:
        return f"mean {list(self.mean)}, std {list(self.std)}"


def foreign_normalization(record: Mapping[str, Any], source: Path) -> Normalization:
    """Take `mean` and `std` from a file of another project.

    Raises:
        LgpError: they are no lists of numbers, or none of pixels in [0, 1].
    """
    try:
        found = Normalization.of(record)
    except (TypeError, ValueError, OverflowError):
        found = Normalization((), ())
    if not found.is_possible():
        shown = escaped(f"mean {record['mean']}, std {record['std']}")[:100]
        raise LgpError(
            f"{source} has {shown}, which are no statistics of pixels in [0, 1], one value a channel: give the right "
            "ones, e.g. --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
        )
    return found


def parse_normalization(mean: str | None, std: str | None) -> Normalization | None:
    """Read statistics as a user writes them, `0.485,0.456,0.406`. Return None where neither is given.

    Raises:
        LgpError: only one of them is given, they have different numbers of channels, or a value is none of pixels in
            [0, 1].
    """
    if mean is None and std is None:
        return None
    given = Normalization(_numbers(mean), _numbers(std))
    if not given.is_possible():
        raise LgpError(
            f"--mean {mean} --std {std} are no statistics: give both, one value a channel, of pixels in [0, 1], "
            "e.g. --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
        )
    return given


def _numbers(text: str | None) -> tuple[float, ...]:
    """Return the numbers of a list with commas, an empty tuple where it holds anything else."""
    try:
        return tuple(float(value) for value in (text or "").split(","))
    except ValueError:
        return ()
