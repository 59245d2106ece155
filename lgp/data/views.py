"""Random views of images. Crop boxes and flips are drawn on the host. Colour operations are batched on the device.

The operations and their distributions are torchvision's, as in MAE and MoCo v3. All parameters are drawn per image from
a counted generator. They are drawn for the whole batch of a step, whichever rows a process computes. Each operation is
applied only to the images that it is drawn for. Kornia's operations do so for a batch. The shift of the hue is written
here: Kornia's is slow, and torchvision's takes one shift for all images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import kornia.enhance as ke
import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Generator, Tensor

from lgp.compute.precision import in_single_precision
from lgp.params.pretrain import ViewParams

ASPECT = (3 / 4, 4 / 3)
TRIES = 10
BLUR_SIGMA = (0.1, 2.0)
TINY = 1e-30  # smaller than any difference of two unequal floats in [0, 1]
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CHUNK_BYTES = 2**22  # pixels that a CPU processes at a time: they stay in its cache


def random_boxes(
    sizes: Tensor, views: int, crop_scale_min: float, rng: Generator, crop_scale_max: float = 1.0
) -> Tensor:
    """Draw crop boxes as torchvision's `RandomResizedCrop` does.

    An area fraction in [crop_scale_min, crop_scale_max] and a log-uniform aspect ratio in [3/4, 4/3] are drawn up to
    ten times, until the box fits. If none fits, the box is the largest centred one of a valid aspect ratio.

    Args:
        sizes: (B, 2) height and width of each image in pixels.
        views: V, boxes per image.
        crop_scale_min: smallest fraction of the area.
        rng: counted generator.
        crop_scale_max: largest fraction of the area.

    Returns:
        (B, V, 4) int64: top, left, height, width.
    """
    b = len(sizes)
    height = sizes[:, 0, None].expand(b, views).double()
    width = sizes[:, 1, None].expand(b, views).double()
    draws = torch.rand(4, b, views, TRIES, generator=rng, dtype=torch.float64)
    area = (height * width)[..., None] * (crop_scale_min + (crop_scale_max - crop_scale_min) * draws[0])
    aspect = torch.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * draws[1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (w <= width[..., None]) & (h >= 1) & (h <= height[..., None])
    first = fits.int().argmax(dim=-1, keepdim=True)  # of equal values, argmax takes the first
    chosen = [t.gather(-1, first).squeeze(-1) for t in (h, w, draws[2], draws[3])]
    fallback_w = torch.minimum(width, (height * ASPECT[1]).round())
    fallback_h = torch.minimum(height, (width / ASPECT[0]).round())
    any_fits = fits.any(dim=-1)
    h = torch.where(any_fits, chosen[0], fallback_h)
    w = torch.where(any_fits, chosen[1], fallback_w)
    top = torch.where(any_fits, (chosen[2] * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(any_fits, (chosen[3] * (width - w + 1)).floor(), ((width - w) / 2).floor())
    return torch.stack([top, left, h, w], dim=-1).long()


def random_flips(images: int, views: int, flip_p: float, rng: Generator) -> Tensor:
    """Draw which views to mirror left to right, each with probability `flip_p`: (images, views) bool."""
    return torch.rand(images, views, generator=rng) < flip_p


@dataclass(frozen=True)
class ColorJitter:
    """The drawn colour operations of one view of B images, on the host, in MoCo v3's order.

    Attributes:
        jittered: (B,) bool, whether brightness, contrast, saturation and hue change.
        order: (B, 4) the jitter operations from first to last: 0 brightness, 1 contrast, 2 saturation, 3 hue.
        factors: (B, 3) of brightness, contrast, saturation; 1 changes nothing.
        shift: (B,) of the hue, in full turns.
        grey: (B,) bool, whether the image loses its colours.
        blur: (B,) bool.
        sigma: (B,) of the Gaussian blur, in pixels.
        solarize: (B,) bool, whether values of 0.5 and more are inverted.
    """

    jittered: Tensor
    order: Tensor
    factors: Tensor
    shift: Tensor
    grey: Tensor
    blur: Tensor
    sigma: Tensor
    solarize: Tensor

    @classmethod
    def draw(cls, images: int, view: int, params: ViewParams, rng: Generator) -> "ColorJitter":
        """Draw for view 0 or 1. The view selects the blur and solarise probabilities."""

        def chosen(p: float) -> Tensor:
            return torch.rand(images, generator=rng) < p

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(images, generator=rng)

        strengths = (params.brightness, params.contrast, params.saturation)
        return cls(
            factors=torch.stack([uniform(1 - s, 1 + s) for s in strengths], dim=1),
            shift=uniform(-params.hue, params.hue),
            jittered=chosen(params.jitter_p),
            order=torch.rand(images, 4, generator=rng).argsort(dim=1),
            grey=chosen(params.grayscale_p),
            blur=chosen(params.blur_p[view]),
            sigma=uniform(*BLUR_SIGMA),
            solarize=chosen(params.solarize_p[view]),
        )

    @classmethod
    def cat(cls, parts: "Sequence[ColorJitter]") -> "ColorJitter":
        """Concatenate the operations of several batches."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __getitem__(self, rows: slice) -> "ColorJitter":
        """Return the operations of some images."""
        return ColorJitter(*(getattr(self, field.name)[rows] for field in fields(self)))


@in_single_precision
def color_jitter(images: Tensor, jitter: ColorJitter, params: ViewParams) -> Tensor:
    """Apply MoCo v3's colour operations to a batch, each image with its own parameters.

    The order is colour jitter, grey, Gaussian blur, solarise. Each image has its own order of the jitter's operations.
    Operations of strength 0 are skipped. Saturation, hue and grey are skipped for images of one channel.

    Args:
        images: (B, C, S, S) float in [0, 1].
        jitter: drawn for the same B images.
        params: strengths.

    Returns:
        (B, C, S, S) float in [0, 1].
    """
    images = images.clone()
    if images.device.type != "cpu":
        _jitter_in_place(images, jitter, params)
        return images
    rows = max(CHUNK_BYTES // max(images[:1].nbytes, 1), 1)
    for start in range(0, len(images), rows):
        chunk = slice(start, start + rows)
        _jitter_in_place(images[chunk], jitter[chunk], params)
    return images


def _jitter_in_place(images: Tensor, jitter: ColorJitter, params: ViewParams) -> None:
    """Apply the operations of `color_jitter` in place."""
    colour, device = images.shape[1] == 3, images.device

    def apply(chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Replace the chosen images by `operation` of them and their rows. `chosen` is on the host: nothing waits."""
        rows = chosen.nonzero()[:, 0]
        if len(rows) == len(images):
            images.copy_(operation(images, rows))
        elif len(rows):
            there = rows.to(device, non_blocking=True)
            images.index_copy_(0, there, operation(images.index_select(0, there), rows))

    def by(values: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda rows: values[rows].to(device, non_blocking=True)

    brightness, contrast, saturation = (by(factor) for factor in jitter.factors.unbind(1))
    shift, sigma = by(jitter.shift), by(jitter.sigma)
    operations: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}
    if params.brightness:
        operations[BRIGHTNESS] = lambda x, rows: ke.adjust_brightness_accumulative(x, brightness(rows))
    if params.contrast:
        operations[CONTRAST] = lambda x, rows: ke.adjust_contrast_with_mean_subtraction(x, contrast(rows))
    if params.saturation and colour:
        operations[SATURATION] = lambda x, rows: ke.adjust_saturation_with_gray_subtraction(x, saturation(rows))
    if params.hue and colour:
        operations[HUE] = lambda x, rows: shift_hue(x, shift(rows))
    for place in jitter.order.unbind(1):
        for number, operation in operations.items():
            apply(jitter.jittered & (place == number), operation)
    if colour:
        apply(jitter.grey, lambda x, _: rgb_to_grayscale(x).expand_as(x))
    # three times the largest sigma to each side, limited by the image
    kernel = 2 * min(math.ceil(3 * BLUR_SIGMA[1]), images.shape[-1] - 1) + 1
    apply(jitter.blur, lambda x, rows: gaussian_blur2d(x, kernel, sigma(rows)[:, None].expand(-1, 2)))
    apply(jitter.solarize, lambda x, _: torch.minimum(x, 1 - x))  # at the threshold 0.5


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of each image, not value and saturation: torchvision's `adjust_hue` with a shift per image.

    V and m are the largest and the smallest of a pixel's r, g, b. C is V - m. H is the new hue in sixths of a turn. The
    new pixel is V - C · clamp(min(k, 4 - k), 0, 1) with k = (n + H) mod 6, for n = 5, 3, 1 (r, g, b).

    Args:
        images: (B, 3, H, W) in [0, 1].
        shift: (B,) in full turns.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = chroma.clamp(min=TINY)
    # weights of 0 or 1 replace `torch.where`, which is many times slower on a CPU
    not_red, not_green = (((value - channel) / TINY).clamp_(max=1) for channel in (red, green))
    from_red, from_green = (green - blue) / divisor, (blue - red) / divisor + 2
    from_blue = (red - green) / divisor + 4
    hue = torch.lerp(from_red, torch.lerp(from_green, from_blue, not_green), not_red)
    hue += 6 * shift[:, None, None]
    corners = torch.tensor([5.0, 3.0, 1.0], device=images.device, dtype=images.dtype)
    k = hue[:, None] + corners[:, None, None]
    k.sub_(torch.floor(k / 6).mul_(6))
    share = k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)  # min(k, 4 - k) = 2 - |k - 2|
    return torch.addcmul(value[:, None], share, chroma[:, None], value=-1)
