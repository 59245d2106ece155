"""Small data sources that tests of images and of labels make."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lgp.data.labels import LabelledImages, write_labels
from lgp.data.preparation import prepare
from lgp.data.storage import Images
from lgp.params.data import DataParams
from lgp.params.file import Params
from lgp.params.labels import LabelsParams

RNG = np.random.default_rng(0)


def png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def folder(root: Path, classes: dict[str, int], split: str = "train", size: tuple[int, int] = (8, 8)) -> Path:
    """Write an image folder with that many images a class."""
    for name, count in classes.items():
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            (root / split / name / f"{i}.png").write_bytes(png(size))
    return root


def write_parquet(
    path: Path,
    labels: list[int | None],
    names: list[str] | None,
    broken: int = 0,
    images: list[bytes] | None = None,
) -> None:
    """Write rows as `datasets` does; the first `broken` images are empty."""
    images = images or [b"" if i < broken else png() for i in range(len(labels))]
    rows = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    table = pa.table({"image": rows, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(table, path)


def data_params(params: Params, source: Any, **changes: Any) -> DataParams:
    source = str(source) if isinstance(source, Path) else source
    base = {"channels": 3, "max_train_images": None, "max_unreadable_share": 0.2, "source": source}
    return DataParams.model_validate(params.data.model_dump() | base | changes)


def images_from(source: Any, out: Path, params: Params, **changes: Any) -> tuple[dict[str, Any], Images]:
    """Prepare the images of a source into `out`; `changes` are of the section `data`."""
    out.mkdir()
    held_out = out.parent / "held_out.csv"
    metrics, kept = prepare(data_params(params, source, **changes), 0, out, held_out)
    kept.write(held_out)
    return metrics, Images(out)


def labels_from(
    source: Any, images: Images, out: Path, params: Params, **changes: Any
) -> tuple[dict[str, Any], LabelledImages]:
    """Write the labels of prepared images into `out`; `changes` are of the section `labels`."""
    out.mkdir()
    settings = LabelsParams.model_validate(params.labels.model_dump() | changes)
    return write_labels(settings, data_params(params, source), images, 0, out), LabelledImages(images.folder, out)


def both_from(source: Any, tmp_path: Path, params: Params, **of_data: Any) -> tuple[dict[str, Any], LabelledImages]:
    """Prepare images and labels of a source below `tmp_path`; return the labels' metrics."""
    _, images = images_from(source, tmp_path / "prepared", params, **of_data)
    return labels_from(source, images, tmp_path / "labels", params)
