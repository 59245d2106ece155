"""Sections `contrastive`, `mim`, `cl`, `joint`, `reverse` and `conflict`: pre-training except the graft."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lgp.params.section import (
    Count,
    Fraction,
    Interpolation,
    NonNegative,
    OpenFraction,
    Positive,
    PositiveFraction,
    Rates,
    Section,
    Whole,
)


class CropScales(Section):
    """The area of a crop: a fraction from `crop_scale_min` to `crop_scale_max` of the image."""

    crop_scale_min: PositiveFraction
    crop_scale_max: PositiveFraction = 1.0

    @model_validator(mode="after")
    def _scales_ascend(self) -> Self:
        if self.crop_scale_min > self.crop_scale_max:
            raise ValueError(f"crop_scale_min {self.crop_scale_min:g} is above crop_scale_max {self.crop_scale_max:g}")
        return self


class ViewParams(CropScales):
    """Random views. Keys in `_p` are probabilities. `blur_p` and `solarize_p` have a value for each contrastive view.

    Jitter strengths are torchvision's. A factor is drawn from [1 - s, 1 + s]. The hue shift is drawn from [-s, s] of a
    full turn.
    """

    interpolation: Interpolation = "bilinear"
    flip_p: Fraction = 0.0
    jitter_p: Fraction = 0.0
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grayscale_p: Fraction = 0.0
    blur_p: tuple[Fraction, Fraction] = (0.0, 0.0)
    solarize_p: tuple[Fraction, Fraction] = (0.0, 0.0)


class SmallViews(CropScales):
    """Small views beside the two large ones (multi-crop: Caron et al. 2020, arXiv 2006.09882, section 3.2).

    Each image gets `count` crops of `size` pixels a side. Flips and colours are those of `views`, except `blur_p` and
    no solarising. With small views the published large ones have a `views.crop_scale_min` of 0.25 or 0.14.
    """

    count: Count
    size: Count
    crop_scale_min: PositiveFraction = 0.05
    crop_scale_max: PositiveFraction = 0.25
    blur_p: Fraction = 0.0

    def beside(self, views: ViewParams) -> ViewParams:
        """Return the augmentation of the small views beside that of the large ones."""
        own = {"crop_scale_min": self.crop_scale_min, "crop_scale_max": self.crop_scale_max}
        return ViewParams(**views.model_dump() | own | {"blur_p": (self.blur_p,) * 2, "solarize_p": (0.0, 0.0)})


class VicregWeights(Section):
    """Weights of VICReg's three terms (Bardes et al. 2022, section 4.1)."""

    invariance: NonNegative = 25.0
    variance: NonNegative = 25.0
    covariance: NonNegative = 1.0


class SwavParams(Section):
    """The prototypes of SwAV (Caron et al. 2020, section 4.1 and appendix A).

    The assignment of a batch to `prototypes` is found by `iterations` of Sinkhorn's algorithm at the temperature
    `epsilon`. The prototypes stay as they start for the first `frozen` part of the training (published: an epoch).
    """

    prototypes: Annotated[Whole, Field(ge=2)] = 128
    epsilon: Positive = 0.05
    iterations: Count = 3
    frozen: Annotated[float, Field(ge=0, lt=1)] = 0.01


class RefineParams(Section):
    """Nearest-neighbour alignment (MIM-Refiner, Alkin et al. 2024, arXiv 2402.10093, section 3).

    A queue keeps the last `queue` projections, at most half as many as there are images. The positive of an image is
    one of its `neighbours` nearest in the queue. `heads` is the number of last blocks that have a head of their own.
    The published encoder is the exponential average of the trained one, over about `average` of the steps.
    """

    queue: Count = 65_536
    neighbours: Count = 20
    heads: Count = 1
    average: PositiveFraction = 0.1


class ContrastiveParams(Section):
    """Objective, heads and views of contrastive learning. The CL baseline and the graft share them.

    All but vicreg read `temperature`. mocov3 and refine read `predictor_hidden`. mocov3 reads `momentum` and `masked`.
    vicreg, swav and refine read the section of their name. `small_views` are for every objective.

    `mask_ratio` of the patches is hidden from the inputs that `masked` names. With `queries` the trained encoder sees
    masked views, and the momentum encoder sees whole ones. With `queries_and_keys` both see the same patches of a view
    (`mae_aug` in LGP's released code). With `one_sided` queries are of the masked first view, and keys are of the whole
    second one (`cmae` there). Small views are never masked.
    """

    objective: Literal["mocov3", "simclr", "vicreg", "swav", "refine"] = "mocov3"
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    masked: Literal["queries", "queries_and_keys", "one_sided"] = "queries"
    vicreg: VicregWeights = VicregWeights()
    swav: SwavParams = SwavParams()
    refine: RefineParams = RefineParams()
    projector_hidden: Count
    projector_dim: Count
    predictor_hidden: Count
    temperature: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    freeze_patch_embed: bool
    views: ViewParams
    small_views: SmallViews | None = None

    @model_validator(mode="after")
    def _only_mocov3_masks_keys(self) -> Self:
        if self.masked != "queries" and self.objective != "mocov3":
            raise ValueError(f"masked {self.masked} is of mocov3, objective is {self.objective}: set it to queries")
        if self.masked != "queries" and not self.mask_ratio:
            raise ValueError(f"masked {self.masked} has no effect with mask_ratio 0: raise it (LGP: 0.75)")
        return self


class TrainingParams(Section):
    """The keys of every training. Learning rates are per 256 images: peak lr = base_lr × batch / 256."""

    epochs: Count
    batch_size: Annotated[Whole, Field(ge=2)]
    warmup_epochs: NonNegative
    weight_decay: NonNegative
    clip_norm: Positive | None = None

    @model_validator(mode="after")
    def _warmup_within_epochs(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be below epochs {self.epochs}")
        return self


class MimParams(TrainingParams):
    """The masked autoencoder (MAE, He et al. 2022)."""

    base_lr: Positive
    mask_ratio: OpenFraction
    decoder_width: Count
    decoder_depth: Count
    decoder_heads: Count
    crop_scale_min: PositiveFraction
    interpolation: Interpolation = "bicubic"
    flip_p: Fraction

    @model_validator(mode="after")
    def _decoder_width_divides(self) -> Self:
        if self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width {self.decoder_width} must be a multiple of 4 and of decoder_heads {self.decoder_heads}"
            )
        return self

    @property
    def views(self) -> ViewParams:
        """MAE's augmentation: crop and flip only (appendix A.1)."""
        return ViewParams(crop_scale_min=self.crop_scale_min, interpolation=self.interpolation, flip_p=self.flip_p)


class ClParams(TrainingParams):
    """MoCo v3 from scratch: the contrastive baseline."""

    base_lr: Positive


class JointParams(TrainingParams):
    """The paper's control: one encoder with the CL loss plus `mim_weight` times the MIM loss."""

    base_lr: Positive
    mim_weight: Positive = 1.0


class ReverseParams(TrainingParams):
    """The paper's control: MIM on top of the CL encoder, one base learning rate per group of blocks of equal size."""

    base_lrs: Rates


class ConflictParams(Section):
    """The measurement of `lgp conflict`: heads fitted to the frozen encoder, then gradients over `batches`."""

    head_epochs: Count = 10
    batches: Annotated[Whole, Field(ge=2)] = 200
    batch_size: Annotated[Whole, Field(ge=2)] = 64
    base_lr: Positive = 4e-3
