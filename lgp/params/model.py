"""Section `model`: the encoder."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from lgp.params.architecture import architecture
from lgp.params.section import Count, Section, whole_number

NUMBERS = ("patch_size", "width", "depth", "heads")


class ModelParams(Section):
    """The encoder: a plain ViT with a class token, or, under `timm`, any plain ViT of timm, which has the numbers."""

    timm: str | None = None
    patch_size: Count
    width: Count
    depth: Count
    heads: Count

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_the_name(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or not isinstance(values.get("timm"), str):
            return values
        found = architecture(values["timm"])._asdict()
        for number in NUMBERS:
            if whole_number(values.get(number, found[number])) != found[number]:
                raise ValueError(
                    f"{number} {values[number]} is not that of {values['timm']}, {found[number]}: leave the numbers "
                    "out, or leave timm out"
                )
        return {**values, **{number: found[number] for number in NUMBERS}}

    @model_validator(mode="after")
    def _width_divides(self) -> Self:
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which 2D sin-cos positions need")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}: choose a divisor")
        return self
