"""What the stage `labels` does, without its process."""

from pathlib import Path

from lgp.data.labels import LabelledImages, write_labels
from lgp.data.storage import Images
from lgp.params.file import load_params
from stages.paths import LABELS, PREPARED


def add_labels() -> LabelledImages:
    """Write the labels of the project in the current folder."""
    params = load_params(Path("params.yaml"))
    LABELS.mkdir(exist_ok=True)
    write_labels(params.labels, params.data, Images(PREPARED), params.seed, LABELS)
    return LabelledImages(PREPARED, LABELS)
