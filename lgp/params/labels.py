"""Section `labels`: the few-label subsets of evaluation. Pre-training reads none of it."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lgp.params.section import Count, LabelsName, OpenFraction, Section, Whole, as_list

ALL_LABELS = "all"


def shot_name(shot: int) -> str:
    """Return the name of the subsets of `shot` images per class."""
    return f"{shot}shot"


class LabelsParams(Section):
    """Few-label subsets by share, by images per class or by published list. Also leaks between train and test."""

    shares: dict[LabelsName, OpenFraction]
    shots: list[Count] = Field(default_factory=list)
    lists: dict[LabelsName, Annotated[tuple[str, ...], BeforeValidator(as_list), Field(min_length=1)]] = Field(
        default_factory=dict
    )
    subsets: Annotated[Whole, Field(ge=5)]
    whole_groups: bool = False
    leaks: Literal["report", "drop_test"] = "report"
    near_duplicate_bits: Annotated[Whole, Field(ge=0, le=32)] | None = 4

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        for name in self.names:
            if name == ALL_LABELS:
                raise ValueError("all means all labels: call the share or list otherwise")
            if self.names.count(name) > 1:
                raise ValueError(f"shares, shots and lists name {name} twice: each name once")
        return self

    @property
    def names(self) -> list[str]:
        """The names of all few-label subsets."""
        return [*self.shares, *(shot_name(shot) for shot in self.shots), *self.lists]
