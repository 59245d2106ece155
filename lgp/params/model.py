"""Section `model`: the encoder."""

from typing import Self

from pydantic import model_validator

from lgp.params.section import Count, Section


class ModelParams(Section):
    """The encoder: a plain ViT with a class token."""

    patch_size: Count
    width: Count
    depth: Count
    heads: Count

    @model_validator(mode="after")
    def _width_divides(self) -> Self:
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which 2D sin-cos positions need")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}: choose a divisor")
        return self
