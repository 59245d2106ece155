"""Random views of images: crop boxes drawn on the host, colour operations batched on the device.

The operations and their distributions are torchvision's (as MAE and MoCo v3 use them); all parameters are
drawn per image from a counted generator, and kornia applies them to the whole batch.
"""

import math

import kornia.enhance as ke
import torch
from kornia.color import rgb_to_grayscale
from kornia.filters import gaussian_blur2d
from torch import Generator, Tensor

from lgp.params import ViewParams

ASPECT = (3 / 4, 4 / 3)
TRIES = 10
BLUR_SIGMA = (0.1, 2.0)


def random_boxes(sizes: Tensor, views: int, crop_scale_min: float, rng: Generator) -> Tensor:
    """Draw crop boxes as torchvision's `RandomResizedCrop` does.

    An area share in [crop_scale_min, 1] and a log-uniform aspect in [3/4, 4/3] are drawn up to ten times,
    until the box fits; if none fits, the largest centred box of a valid aspect is taken.

    Args:
        sizes: (B, 2) height and width of each image in pixels.
        views: V, boxes per image.
        crop_scale_min: smallest share of the area.
        rng: counted generator.

    Returns:
        (B, V, 4) int64: top, left, height, width.
    """
    b = len(sizes)
    height = sizes[:, 0, None].expand(b, views).double()
    width = sizes[:, 1, None].expand(b, views).double()
    draws = torch.rand(4, b, views, TRIES, generator=rng, dtype=torch.float64)
    area = (height * width)[..., None] * (crop_scale_min + (1 - crop_scale_min) * draws[0])
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


def flip(crops: Tensor, flip_p: float, rng: Generator) -> Tensor:
    """Mirror each view (B, V, C, S, S) left to right with probability `flip_p`."""
    chosen = torch.rand(crops.shape[:2], generator=rng) < flip_p
    return torch.where(chosen[..., None, None, None], crops.flip(-1), crops)


def photometric(images: Tensor, view: int, params: ViewParams, rng: Generator) -> Tensor:
    """Apply MoCo v3's colour operations to one view of a batch, each image with its own parameters.

    Colour jitter (its operations in one random order per batch), grey, Gaussian blur, solarise, in this
    order; each image takes part in each with its probability. Grey images skip saturation, hue and grey.

    Args:
        images: (B, C, S, S) float in [0, 1].
        view: 0 or 1, picks the blur and solarise probabilities.
        params: probabilities and strengths.
        rng: counted generator, on the CPU.

    Returns:
        (B, C, S, S) float in [0, 1].
    """
    b, colour = len(images), images.shape[1] == 3

    def chosen(p: float) -> Tensor:
        return (torch.rand(b, generator=rng) < p).to(images.device)[:, None, None, None]

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(b, generator=rng)).to(images.device)

    jittered = images
    operations = [
        (params.brightness, ke.adjust_brightness_accumulative),
        (params.contrast, ke.adjust_contrast_with_mean_subtraction),
        (params.saturation if colour else 0.0, ke.adjust_saturation_with_gray_subtraction),
    ]
    factors = [uniform(1 - strength, 1 + strength) for strength, _ in operations]
    shift = uniform(-params.hue, params.hue) * (2 * math.pi)
    apply_jitter = chosen(params.jitter_p)
    for i in torch.randperm(4, generator=rng).tolist():
        if i == 3 and colour and params.hue:
            jittered = ke.adjust_hue(jittered, shift)
        elif i < 3 and operations[i][0]:
            jittered = operations[i][1](jittered, factors[i])
    images = torch.where(apply_jitter, jittered, images)
    apply_grey = chosen(params.grayscale_p)
    if colour and params.grayscale_p:
        images = torch.where(apply_grey, rgb_to_grayscale(images).expand_as(images), images)
    apply_blur, sigma = chosen(params.blur_p[view]), uniform(*BLUR_SIGMA)
    if params.blur_p[view]:
        # three of the largest sigma to each side, as far as the image reaches
        kernel = 2 * min(math.ceil(3 * BLUR_SIGMA[1]), images.shape[-1] - 1) + 1
        images = torch.where(apply_blur, gaussian_blur2d(images, kernel, sigma[:, None].expand(-1, 2)), images)
    apply_solarize = chosen(params.solarize_p[view])
    if params.solarize_p[view]:
        images = torch.where(apply_solarize & (images >= 0.5), 1 - images, images)
    return images
