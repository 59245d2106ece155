"""Section `data`: the source of the images, and which of them are held out."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lgp.params.section import Count, Fraction, OpenFraction, Positive, Section, Whole


class DataParams(Section):
    """The images and their split into a training, a validation and a test part."""

    source: str
    image_size: Count
    channels: Literal[1, 3]
    test_share: OpenFraction
    val_share: OpenFraction
    max_unreadable_share: Fraction
    drop_near_test_bits: Annotated[Whole, Field(ge=0, le=32)] | None = None
    max_train_images: Count | None = None
    max_test_images: Count | None = None
    storage: Literal["copy", "reference"] = "copy"
    store_short_side: Count | None = None
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    mean: list[Fraction] | None = None
    std: list[Positive] | None = None

    @model_validator(mode="after")
    def _statistics_match_channels(self) -> Self:
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and len(given) != self.channels:
                raise ValueError(
                    f"{name} has {len(given)} values for {self.channels} channels: give one a channel, or null"
                )
        return self
