"""Views equal torchvision's, operation by operation, on the same parameters."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf
from torchvision.transforms.v2 import RandomResizedCrop

from lgp.data.prepared import crop_and_resize
from lgp.data.views import flip, photometric, random_boxes
from lgp.params import ViewParams
from lgp.randomness import generator


def images(batch: int = 16, channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(batch, channels, size, size)


def test_crop_and_resize_equals_torchvision() -> None:
    batch = images()
    boxes = random_boxes(torch.tensor([[32, 32]] * 16), 1, 0.08, generator(0, "x"))[:, 0]
    ours = crop_and_resize(batch, boxes, 32)
    for image, (top, left, height, width), cut in zip(batch, boxes.tolist(), ours, strict=True):
        args = (top, left, height, width, [32, 32], InterpolationMode.BILINEAR)
        assert torch.allclose(cut, tvf.resized_crop(image, *args, antialias=True), atol=1e-5)


def test_whole_image_is_unchanged() -> None:
    batch = images(2, 1, 8)
    assert torch.allclose(crop_and_resize(batch, torch.tensor([[0, 0, 8, 8]] * 2), 8), batch, atol=1e-6)


def test_boxes_lie_inside_and_have_valid_aspect() -> None:
    sizes = torch.tensor([[32, 32], [20, 90], [500, 375], [8, 8]]).repeat(500, 1)
    boxes = random_boxes(sizes, 2, 0.2, generator(0, "x"))
    top, left, height, width = boxes.unbind(-1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= sizes[:, None, 0]).all()
    assert (left + width <= sizes[:, None, 1]).all()
    large = sizes[:, 0] == 500
    assert ((width / height)[large] < 4 / 3 + 0.02).all()
    assert ((height * width)[large] >= 0.2 * 500 * 375 * 0.98).all()


def test_boxes_have_torchvisions_distribution() -> None:
    ours = random_boxes(torch.tensor([[100, 140]] * 4000), 1, 0.2, generator(0, "x"))[:, 0].double()
    image = torch.empty(3, 100, 140)
    crop = RandomResizedCrop(10, scale=(0.2, 1.0))
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[d[k] for k in ("top", "left", "height", "width")] for d in drawn]).double()
    error = 4 * (ours.std(0) ** 2 / 4000 + theirs.std(0) ** 2 / 4000).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < error).all()
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.08)


def test_too_narrow_image_gets_the_largest_centred_box() -> None:
    boxes = random_boxes(torch.tensor([[4, 400]]), 1, 1.0, generator(0, "x"))
    assert boxes.tolist() == [[[0, 197, 4, 5]]]  # width 5 is 4 × 4/3, rounded


def test_flip_mirrors_its_share() -> None:
    crops = torch.arange(4).repeat(400, 2, 1, 4, 1)
    flipped = flip(crops, 0.25, generator(0, "x"))
    mirrored = (flipped == crops.flip(-1)).all(dim=(-1, -2, -3))
    assert torch.equal(flipped[~mirrored], crops[~mirrored])
    assert mirrored.double().mean().item() == pytest.approx(0.25, abs=0.05)
    assert torch.equal(flip(crops, 0.0, generator(0, "x")), crops)


def one_operation(**changes: Any) -> ViewParams:
    return ViewParams(**({"crop_scale_min": 1.0, "jitter_p": 1.0} | changes))


@pytest.mark.parametrize(
    ("name", "index", "operation"),
    [
        ("brightness", 0, tvf.adjust_brightness),
        ("contrast", 1, tvf.adjust_contrast),
        ("saturation", 2, tvf.adjust_saturation),
    ],
)
def test_jitter_operation_equals_torchvision(name: str, index: int, operation: Any) -> None:
    batch = images()
    ours = photometric(batch, 0, one_operation(**{name: 0.4}), generator(0, "x"))
    rng = generator(0, "x")  # the factors are drawn first, in this order
    factors = [1 + s * (2 * torch.rand(16, generator=rng) - 1) for s in (0.4 if i == index else 0.0 for i in range(3))]
    theirs = torch.stack([operation(i, f) for i, f in zip(batch, factors[index].tolist(), strict=True)])
    # the two libraries round the grey weights differently in the fourth digit
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_hue_equals_torchvision() -> None:
    batch = images()
    ours = photometric(batch, 0, one_operation(hue=0.1), generator(0, "x"))
    rng = generator(0, "x")
    shift = [torch.rand(16, generator=rng) for _ in range(4)][3] * 0.2 - 0.1
    theirs = torch.stack([tvf.adjust_hue(i, s) for i, s in zip(batch, shift.tolist(), strict=True)])
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_grey_and_solarise_equal_torchvision() -> None:
    batch = images()
    grey = photometric(batch, 0, one_operation(jitter_p=0, grayscale_p=1), generator(0, "x"))
    assert torch.allclose(grey, tvf.rgb_to_grayscale(batch, 3), atol=2e-3)
    solarised = photometric(batch, 1, one_operation(jitter_p=0, solarize_p=(0, 1)), generator(0, "x"))
    assert torch.equal(solarised, tvf.solarize(batch, 0.5))


def test_blur_equals_torchvision() -> None:
    batch = images(4)
    ours = photometric(batch, 0, one_operation(jitter_p=0, blur_p=(1, 0)), generator(0, "x"))
    candidates = torch.linspace(0.1, 2.0, 400)
    for image, blurred in zip(batch, ours, strict=True):
        errors = [
            (tvf.gaussian_blur(image, [13, 13], [s, s]) - blurred).abs().max().item() for s in candidates.tolist()
        ]
        assert min(errors) < 5e-3


def test_every_operation_takes_its_share_of_the_images() -> None:
    batch = images(2000, 3, 4)
    params = ViewParams(crop_scale_min=1, grayscale_p=0.2, solarize_p=(0, 0.3))
    for view, expected in ((0, 0.2), (1, 1 - 0.8 * 0.7)):
        changed = (photometric(batch, view, params, generator(0, "x")) != batch).flatten(1).any(1)
        assert changed.double().mean().item() == pytest.approx(expected, abs=0.04)


def test_grey_images_take_part_without_colour() -> None:
    everything = ViewParams(
        crop_scale_min=1, jitter_p=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale_p=0.2,
        blur_p=(1, 0.1), solarize_p=(0, 0.2),
    )  # fmt: skip
    views = photometric(images(8, 1, 8), 0, everything, generator(0, "x"))
    assert views.shape == (8, 1, 8, 8)
    assert views.min() >= 0
    assert views.max() <= 1


def test_views_are_a_function_of_the_generator_alone() -> None:
    params = ViewParams(crop_scale_min=1, jitter_p=0.8, brightness=0.4, hue=0.1, blur_p=(1, 0.1))
    batch = images()
    first, again = (photometric(batch, 0, params, generator(0, "x", 5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, photometric(batch, 0, params, generator(0, "x", 6)))
    assert math.isfinite(first.sum().item())
