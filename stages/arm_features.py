"""The features of an arm for the tools that choose or check images: `lgp select`, `lgp audit`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.paths import LABELS, PREPARED, default_arm, encoder_folder

if TYPE_CHECKING:
    from lgp.data.labels import LabelledImages
    from lgp.features.cache import Features
    from lgp.params.file import Params


@dataclass(frozen=True)
class ArmFeatures:
    """An arm, its images, the features of its encoder, and the digest of that."""

    arm: str
    data: "LabelledImages"
    features: "Features"
    encoder: str


def arm_features(arm: str | None, params: "Params", check: "Callable[[LabelledImages], None]") -> ArmFeatures:
    """Open the features of an arm. An accepted arm that did not train is told.

    Args:
        arm: its name. None: the first of `default_arm`.
        params: the parameters.
        check: raises an error for images that do not do, before any work.
    """
    from lgp.compute.device import choose_device
    from lgp.data.labels import LabelledImages
    from lgp.features.of_encoder import encoder_features
    from lgp.models.files import check_trained, encoder_digest

    arm = arm or default_arm()
    folder, data = encoder_folder(arm), LabelledImages(PREPARED, LABELS)
    check(data)
    features = encoder_features(folder, data, params, choose_device(params.run))
    if warning := check_trained(folder):
        print(warning)
    return ArmFeatures(arm, data, features, encoder_digest(folder))
