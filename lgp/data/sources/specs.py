"""A data source as `open_sources` takes it. The stage `inputs` makes it with every `dvc repro`, so it is no model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from lgp.data.sources.offers import Columns

if TYPE_CHECKING:
    from lgp.params.data import ColumnsParams, SourceParams

TABLES = ("csv", "tsv", "jsonl")  # those of `lgp.params.data`, which takes long to import
DIGITS = "digits"  # the built-in images

Source = Union[str, "SourceParams"]
"""An entry of `data.source`: a text, whose layout is found when it is opened, or a mapping."""


@dataclass(frozen=True)
class Spec:
    """One source whose layout is known.

    Attributes:
        kind: the layout, one of `lgp.params.data.KINDS`.
        place: a path, a pattern of paths, an address or a name.
        columns: its own names of columns. None: those of `data.columns`.
        root: where the paths of a table start. None: at its folder.
        class_folders: whether the folders of an image folder are classes. None: unless a table labels its images.
    """

    kind: str
    place: str
    columns: Columns | None = None
    root: str | None = None
    class_folders: bool | None = None


def spec_of(source: "SourceParams") -> Spec:
    """Return a source that is given as a mapping."""
    columns = columns_of(source.columns) if source.columns else None
    return Spec(source.kind, source.place, columns, source.root, source.class_folders)


def columns_of(columns: "ColumnsParams | Columns | None") -> Columns:
    """Return the key `data.columns`, as it is read from tables."""
    return Columns(*(getattr(columns, role) for role in Columns._fields)) if columns else Columns()
