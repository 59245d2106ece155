"""Section `data`: the sources of the images, and which of them are held out."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lgp.params.section import Count, Fraction, Positive, PositiveFraction, Section, Whole, as_list

Share = Annotated[float, Field(ge=0, lt=1)]
TABLES = ("csv", "tsv", "jsonl")
KINDS = ("folder", *TABLES, "parquet", "arrow", "tar", "zip", "npz", "hf", "torchvision", "builtin")


class ColumnsParams(Section):
    """Names of columns in a table. None: the first of the usual names that the table has."""

    image: str | None = None
    label: str | None = None
    split: str | None = None
    group: str | None = None


class SourceParams(Section):
    """One source: where it is, by its layout. Exactly one layout is given.

    `root` is where the paths of a table start, by default the folder of the table. `class_folders` says whether the
    folders of an image folder are its classes, by default yes, unless a table of the list labels its images.
    """

    folder: str | None = None
    csv: str | None = None
    tsv: str | None = None
    jsonl: str | None = None
    parquet: str | None = None
    arrow: str | None = None
    tar: str | None = None
    zip: str | None = None
    npz: str | None = None
    hf: str | None = None
    torchvision: str | None = None
    builtin: Literal["digits"] | None = None
    columns: ColumnsParams | None = None
    root: str | None = None
    class_folders: bool | None = None

    @property
    def kind(self) -> str:
        """The layout: one of `KINDS`."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def place(self) -> str:
        """A path, a pattern of paths, an address or a name."""
        return str(getattr(self, self.kind))

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a source has one of {', '.join(KINDS)}, this one has {', '.join(given) or 'none'}")
        return self


def _as_sources(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


# a text is a path or a name, whose layout is found when it is opened
Sources = Annotated[list[str | SourceParams], BeforeValidator(_as_sources), Field(min_length=1)]


class DataParams(Section):
    """The images and their split into a training, a validation and a test part.

    `labels` are tables that label images of `source`. Later ones have the last word.
    """

    source: Sources
    columns: ColumnsParams = Field(default_factory=ColumnsParams)
    labels: Annotated[tuple[str, ...], BeforeValidator(as_list)] = ()
    image_size: Count
    channels: Annotated[Whole, Field(ge=1, le=64)]
    test_share: Share
    val_share: Share
    max_unreadable_share: Fraction
    storage: Literal["copy", "reference"] = "copy"
    store_short_side: Count | None = None
    noticed_by: Literal["time", "digest"] = "time"
    drop_near_test_bits: Annotated[Whole, Field(ge=0, le=32)] | None = None
    max_train_images: Count | None = None
    max_test_images: Count | None = None
    eval_crop: PositiveFraction = 1.0
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
