"""Sources of images in a folder: what a user's folder and tables look like, and how they are prepared and labelled."""

import io
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from project import preset
from tried import Wrong

if TYPE_CHECKING:
    from lgp.data.labels import LabelledImages


def picture(rng: random.Random, form: str = "png", mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    """Encode noise."""
    from PIL import Image

    width, height = size
    image = Image.frombytes("RGB", size, rng.randbytes(3 * width * height)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def prepare(source: Any, folder: Path, **changes: Any) -> "LabelledImages":
    """Prepare a source, and its labels, below `folder`, as the stages `prepare` and `labels` do.

    Whatever is written must be readable.
    """
    from lgp.data.labels import LabelledImages, describe, write_labels
    from lgp.data.preparation import describe as describe_images
    from lgp.data.preparation import prepare as prepare_images
    from lgp.data.storage import Images
    from lgp.params.data import DataParams
    from lgp.params.labels import LabelsParams

    of_data = {"source": source, "channels": 3, "max_unreadable_share": 0.9} | changes
    data = DataParams.model_validate(preset()["data"] | of_data)
    labels = LabelsParams.model_validate(preset()["labels"] | {"shares": {"50pct": 0.5}})
    images, written = folder / "prepared", folder / "labels"
    for path in (images, written):
        path.mkdir()
    metrics, held_out = prepare_images(data, 0, images, folder / "held_out.csv")
    held_out.write(folder / "held_out.csv")
    print(*describe_images(metrics), sep="\n")
    print(*describe(write_labels(labels, data, Images(images), 0, written), labels), sep="\n")
    result = LabelledImages(images, written)
    result.open_all()
    for file in folder.rglob("*.json"):
        file.read_text(encoding="utf-8")
    if len(result.paths) != len(set(result.paths)):
        raise Wrong(f"two images have one path: {result.paths}")
    return result
