"""The statistics by which an encoder's input is normalised: as a user writes them, and of the same images."""

import pytest
import torch
from conftest import FOREIGN

from lgp.data.labels import LabelledImages
from lgp.data.normalization import Normalization, parse_normalization
from lgp.errors import LgpError


def test_statistics_are_read_as_a_user_writes_them() -> None:
    assert parse_normalization(None, None) is None
    assert parse_normalization("0.485, 0.5,0", "0.25,0.5,1") == Normalization((0.485, 0.5, 0.0), (0.25, 0.5, 1.0))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ("0.5", None),
        (None, "0.5"),
        ("0.5,0.5", "0.5"),
        ("0,5", "0,x"),
        ("124", "58"),
        ("0.5", "0"),
        ("nan", "0.5"),
        ("", ""),
    ],
)
def test_statistics_of_no_image_are_refused(mean: str | None, std: str | None) -> None:
    with pytest.raises(LgpError, match=f"--mean {mean} --std {std} are no statistics: give both, one value a channel"):
        parse_normalization(mean, std)


def test_images_are_normalised_by_the_statistics_that_are_asked_for(prepared: LabelledImages) -> None:
    pixels, before = prepared.whole(prepared.ids("val")), prepared.normalization
    foreign = prepared.normalized_by(FOREIGN)
    assert torch.allclose(foreign.normalize(pixels), (pixels / 255 - 0.9) / 0.1, atol=1e-6)
    assert torch.equal(foreign.whole(foreign.ids("val")), pixels)
    assert prepared.normalization == before != foreign.normalization == FOREIGN
    assert torch.equal(prepared.normalized_by(before).normalize(pixels), prepared.normalize(pixels))
