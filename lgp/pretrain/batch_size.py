"""Batches of a few images: a batch size above the number of images is lowered to it, and the rate with it."""

from lgp.compute.distributed import world_size
from lgp.params.arms import TRAINED
from lgp.params.file import Params
from lgp.params.section import Section


def with_fitting_batches(params: Params, images: int) -> tuple[Params, dict[str, str]]:
    """Return parameters in which no arm has a larger batch than there are images, and a warning for each lowered one.

    Peak rates are per 256 images, so they are scaled by the lowered size. A lowered size can be cut into equal parts.

    Args:
        params: the file, or the sections that a stage reads.
        images: number of images of the training part.
    """
    fitting, warnings = params.model_copy(), {}
    for arm in TRAINED:
        section: Section | None = params.__dict__.get(arm)
        size = getattr(section, "batch_size", 0)
        parts = world_size() * params.run.accumulate.get(arm, 1)
        lowered = images // parts * parts
        if section is not None and size > images and lowered > 1:
            fitting.__dict__[arm] = section.model_copy(update={"batch_size": lowered})
            warnings[arm] = (
                f"{arm}.batch_size {size} is more than the {images} images of the training part: it is {lowered} here, "
                "and the rate is scaled by it"
            )
    return fitting, warnings
