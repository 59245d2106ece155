"""The base class of a section of the parameter file, and the types of its values."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


def whole_number(value: Any) -> Any:
    """Read `1e2` as a whole number. PyYAML reads it as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return int(number) if isinstance(value, str) and number.is_integer() else value


def as_list(value: Any) -> Any:
    """Return a single name as a tuple of one, any other value unchanged."""
    return (value,) if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(whole_number)]
Count = Annotated[Whole, Field(ge=1)]
Rates = Annotated[list[NonNegative], Field(min_length=1)]
Interpolation = Literal["bilinear", "bicubic"]
# no hyphen: file names are ARM-TASK
LabelsName = Annotated[str, Field(pattern="^[a-z0-9_]+$")]
ArmName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


class Section(BaseModel):
    """A section of the file. Unknown keys and non-finite numbers are errors. Values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
