"""The statistics by which an encoder's input is normalised. They travel with the encoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lgp.errors import LgpError


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation per channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Normalization":
        """Take `mean` and `std` from a record: the `meta.json` of prepared images, or timm's `pretrained_cfg`."""
        return cls(tuple(map(float, record["mean"])), tuple(map(float, record["std"])))

    def __str__(self) -> str:
        return f"mean {list(self.mean)}, std {list(self.std)}"


def parse_normalization(mean: str | None, std: str | None) -> Normalization | None:
    """Read statistics as a user writes them, `0.485,0.456,0.406`. Return None where neither is given.

    Raises:
        LgpError: only one of them is given, they have different numbers of channels, or a value is none of pixels in
            [0, 1].
    """
    if mean is None and std is None:
        return None
    means, stds = _numbers(mean), _numbers(std)
    possible = all(0 <= m <= 1 for m in means) and all(0 < s <= 1 for s in stds)
    if not means or len(means) != len(stds) or not possible:
        raise LgpError(
            f"--mean {mean} --std {std} are no statistics: give both, one value a channel, of pixels in [0, 1], "
            "e.g. --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
        )
    return Normalization(means, stds)


def _numbers(text: str | None) -> tuple[float, ...]:
    """Return the numbers of a list with commas, an empty tuple where it holds anything else."""
    try:
        return tuple(float(value) for value in (text or "").split(","))
    except ValueError:
        return ()
