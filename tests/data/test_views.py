"""Views equal torchvision's, operation by operation, on the same parameters."""

import functools
import itertools
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from arrivals import jittered
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf
from torchvision.transforms.v2 import RandomResizedCrop

from lgp.compute.randomness import generator
from lgp.data.storage import crop_and_resize
from lgp.data.views import TRIES, ColorJitter, color_jitter, random_boxes, random_flips, shift_hue
from lgp.params.pretrain import ViewParams


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


def slow_box(size: tuple[int, int], crop_scale_min: float, draws: Tensor) -> tuple[int, int, int, int]:
    """Draw one box as torchvision's code does, one try after another. `draws` (4, tries) are uniform in [0, 1]."""
    height, width = size
    for area_draw, aspect_draw, top_draw, left_draw in draws.T.tolist():
        area = height * width * (crop_scale_min + (1 - crop_scale_min) * area_draw)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 4), (4, 3), (5, 5), (2, 9), (30, 17)])
def test_boxes_of_small_images_equal_a_slow_reference(size: tuple[int, int]) -> None:
    boxes = random_boxes(torch.tensor([size] * 400), 2, 0.1, generator(0, "x"))
    draws = torch.rand(4, 400, 2, TRIES, generator=generator(0, "x"), dtype=torch.float64)
    for image, view in itertools.product(range(400), range(2)):
        assert tuple(boxes[image, view].tolist()) == slow_box(size, 0.1, draws[:, image, view])


def test_operations_of_two_batches_are_joined_in_order() -> None:
    parts = [ColorJitter.draw(n, v, params_with(**MOCO), generator(v, "x")) for v, n in ((0, 3), (1, 2))]
    joined = ColorJitter.cat(parts)
    for field in fields(ColorJitter):
        assert torch.equal(getattr(joined, field.name), torch.cat([getattr(part, field.name) for part in parts]))


def test_too_narrow_image_gets_the_largest_centred_box() -> None:
    boxes = random_boxes(torch.tensor([[4, 400]]), 1, 1.0, generator(0, "x"))
    assert boxes.tolist() == [[[0, 197, 4, 5]]]  # width 5 is 4 × 4/3, rounded
    boxes = random_boxes(torch.tensor([[400, 4]]), 1, 1.0, generator(0, "x"))
    assert boxes.tolist() == [[[197, 0, 5, 4]]]


def test_flips_take_their_share() -> None:
    assert random_flips(4000, 2, 0.25, generator(0, "x")).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not random_flips(100, 2, 0.0, generator(0, "x")).any()


def params_with(**changes: Any) -> ViewParams:
    return ViewParams(**({"crop_scale_min": 1.0, "jitter_p": 1.0} | changes))


MOCO = {
    "jitter_p": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale_p": 0.2,
    "blur_p": (1.0, 0.1), "solarize_p": (0.0, 0.2),
}  # fmt: skip


def drawn(batch: Tensor, params: ViewParams, view: int = 0) -> tuple[ColorJitter, Tensor]:
    jitter = ColorJitter.draw(len(batch), view, params, generator(0, "x"))
    return jitter, color_jitter(batch, jitter, params)


def one_by_one(operation: Any, batch: Tensor, values: Tensor) -> Tensor:
    return torch.stack([operation(image, value) for image, value in zip(batch, values.tolist(), strict=True)])


# the two libraries round the grey weights differently in the fourth digit
GREY_WEIGHTS = 2e-3


@pytest.mark.parametrize(
    ("index", "name", "operation"),
    [
        (0, "brightness", tvf.adjust_brightness),
        (1, "contrast", tvf.adjust_contrast),
        (2, "saturation", tvf.adjust_saturation),
    ],
)
def test_jitter_operation_equals_torchvision(index: int, name: str, operation: Any) -> None:
    batch = images()
    jitter, ours = drawn(batch, params_with(**{name: 0.4}))
    factors = jitter.factors[:, index]
    assert ((factors - 1).abs() <= 0.4).all()
    assert factors.std() > 0.1
    assert torch.allclose(ours, one_by_one(operation, batch, factors), atol=GREY_WEIGHTS)


def test_hue_equals_torchvision() -> None:
    batch = images()
    batch[:4] = (batch[:4] * 3).round() / 3  # greys, and two channels alike
    jitter, ours = drawn(batch, params_with(hue=0.5))
    assert torch.allclose(ours, one_by_one(tvf.adjust_hue, batch, jitter.shift), atol=1e-5)
    # saturated pixels of every order of the channels, and shifts of more than a turn
    corners = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)]).float()[:, :, None, None]
    for shift in (-0.5, -1 / 3, 0.0, 1 / 6, 0.5):
        assert torch.allclose(shift_hue(corners, torch.full((8,), shift)), tvf.adjust_hue(corners, shift), atol=1e-5)


def test_grey_and_solarise_equal_torchvision() -> None:
    batch = images()
    _, grey = drawn(batch, params_with(jitter_p=0, grayscale_p=1))
    assert torch.allclose(grey, tvf.rgb_to_grayscale(batch, 3), atol=GREY_WEIGHTS)
    _, solarised = drawn(batch, params_with(jitter_p=0, solarize_p=(0, 1)), view=1)
    assert torch.equal(solarised, tvf.solarize(batch, 0.5))


def test_blur_equals_torchvision() -> None:
    batch = images()
    jitter, ours = drawn(batch, params_with(jitter_p=0, blur_p=(1, 0)))
    assert ((jitter.sigma >= 0.1) & (jitter.sigma <= 2)).all()
    theirs = one_by_one(lambda image, sigma: tvf.gaussian_blur(image, [13, 13], [sigma, sigma]), batch, jitter.sigma)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_whole_recipe_equals_torchvisions_operations_image_by_image() -> None:
    batch = images(64)
    for view in (0, 1):
        params = params_with(**MOCO)
        jitter, ours = drawn(batch, params, view)
        for i, image in enumerate(batch):
            expected = jittered(image, jitter, i)
            # solarising turns values around 0.5, where a rounding is not small
            near = (ours[i] - expected).abs() < 5 * GREY_WEIGHTS
            assert near.double().mean() > (0.99 if jitter.solarize[i] else 0.9999)


def test_every_order_of_the_jitter_is_as_likely() -> None:
    jitter = ColorJitter.draw(4800, 0, params_with(**MOCO), generator(0, "x"))
    orders = {tuple(order) for order in jitter.order.tolist()}
    assert len(orders) == 24
    first = torch.bincount(jitter.order[:, 0], minlength=4)
    assert ((first - 1200).abs() < 4 * 30).all()


def test_every_operation_takes_its_share_of_the_images() -> None:
    jitter = [ColorJitter.draw(4000, view, params_with(**MOCO), generator(0, "x", view)) for view in (0, 1)]
    for view, of_view in enumerate(jitter):
        for name, expected in (
            ("jittered", 0.8),
            ("grey", 0.2),
            ("blur", (1.0, 0.1)[view]),
            ("solarize", (0.0, 0.2)[view]),
        ):
            assert getattr(of_view, name).double().mean().item() == pytest.approx(expected, abs=0.03)


def test_images_that_no_operation_is_drawn_for_stay_as_they_are() -> None:
    batch = images(200, 3, 4)
    jitter, ours = drawn(batch, params_with(jitter_p=0.5, brightness=0.4))
    changed = (ours != batch).flatten(1).any(1)
    assert torch.equal(changed, jitter.jittered)


def test_grey_images_look_as_they_would_in_three_equal_channels() -> None:
    batch, params = images(64, 1, 8), params_with(**MOCO)
    jitter, ours = drawn(batch, params)
    in_colour = color_jitter(batch.expand(-1, 3, -1, -1), jitter, params)
    assert ours.shape == batch.shape
    assert torch.allclose(in_colour, ours.expand_as(in_colour), atol=GREY_WEIGHTS)


def test_a_part_of_the_batch_gets_the_same_views_as_in_the_whole() -> None:
    batch, params = images(12), params_with(**MOCO)
    jitter, whole = drawn(batch, params)
    part = color_jitter(batch[4:8], jitter[4:8], params)
    assert torch.allclose(part, whole[4:8], atol=1e-6)


def test_chunks_of_a_batch_get_the_same_views(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, params = images(12), params_with(**MOCO)
    _, whole = drawn(batch, params)
    monkeypatch.setattr("lgp.data.views.CHUNK_BYTES", 5 * batch[:1].nbytes)
    assert torch.allclose(drawn(batch, params)[1], whole, atol=1e-6)


def test_mixed_precision_changes_no_view() -> None:
    batch, params = images(), params_with(**MOCO)
    jitter, plain = drawn(batch, params)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(color_jitter(batch, jitter, params), plain)


def test_views_are_a_function_of_the_generator_alone() -> None:
    params, batch = params_with(**MOCO), images()
    first, again = drawn(batch, params)[1], drawn(batch, params)[1]
    assert torch.equal(first, again)
    other = color_jitter(batch, ColorJitter.draw(len(batch), 0, params, generator(0, "x", 6)), params)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("size", [4, 6, 7, 8])
def test_blur_of_a_small_image_reaches_no_further_than_the_image(size: int) -> None:
    batch, kernel = images(8, 3, size), 2 * min(6, size - 1) + 1
    jitter, ours = drawn(batch, params_with(jitter_p=0, blur_p=(1, 0)))
    blur = functools.partial(tvf.gaussian_blur, kernel_size=[kernel, kernel])
    theirs = one_by_one(lambda image, sigma: blur(image, sigma=[sigma, sigma]), batch, jitter.sigma)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_draws_of_a_seed_stay_what_they_are() -> None:
    """Else encoders of the same parameters change. The numbers were written down on 2026-11-25."""
    rng = generator(0, "x")
    boxes = random_boxes(torch.tensor([[90, 120], [60, 50]]), 2, 0.2, rng)
    assert boxes.tolist() == [[[4, 5, 68, 75], [5, 33, 73, 73]], [[11, 8, 29, 36], [10, 0, 46, 46]]]
    assert random_flips(2, 4, 0.5, rng).int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    jitter = ColorJitter.draw(3, 1, params_with(**MOCO | {"blur_p": (1.0, 0.5)}), rng)
    sums = [getattr(jitter, field.name).double().sum().item() for field in fields(jitter)]
    assert sums == pytest.approx([2, 18, 10.140401, 0.051975, 0, 1, 2.871875, 0], abs=1e-5)


def test_mixed_channels_of_a_grey_batch_are_left_out() -> None:
    batch = images(4, 1, 8)
    _, ours = drawn(batch, params_with(saturation=0.4, hue=0.2, grayscale_p=1))
    assert torch.equal(ours, batch)
