"""Sections `features`, `linear`, `fewshot`, `finetune` and `semi`: evaluation."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lgp.params.pretrain import TrainingParams, ViewParams
from lgp.params.section import (
    Count,
    Fraction,
    Interpolation,
    NonNegative,
    OpenFraction,
    Positive,
    PositiveFraction,
    Section,
    Whole,
)


class FeatureParams(Section):
    """Frozen features: class token or average patch after each of the last `blocks` blocks, concatenated."""

    pool: Literal["class_token", "average"] = "class_token"
    blocks: Count = 1
    by_depth: bool = True
    dtype: Literal["float16", "float32"] = "float32"


class LinearParams(Section):
    """Evaluation with all labels: linear heads trained by SGD, and k-NN, on frozen features.

    Each pair of a `base_lrs` value (per 256 images) and a `weight_decays` value trains one head. The best head on val
    is reported. The method `sweep` uses cached features. The method `augmented` uses features of random crops and
    flips.
    """

    method: Literal["sweep", "augmented"] = "sweep"
    base_lrs: Annotated[list[Positive], Field(min_length=1)]
    weight_decays: Annotated[list[NonNegative], Field(min_length=1)]
    epochs: Count
    batch_size: Annotated[Whole, Field(ge=2)]
    batch_norm: bool
    crop_scale_min: PositiveFraction
    flip_p: Fraction
    knn_k: Count
    knn_temperature: Positive


class FewShotParams(Section):
    """Evaluation with few labels: a linear classifier on frozen features.

    `method` is logistic regression, or ridge regression on one-hot labels, which is in closed form and faster.
    `choose` sets how the inverse regularisation strength C is chosen. `cross_validation` uses only the labelled images;
    if a class has a single one, C is `c_fixed`. `validation` uses val. `fixed` takes `c_fixed`.
    """

    method: Literal["logistic", "ridge"] = "logistic"
    scaling: Literal["standardized", "normalized"]
    choose: Literal["cross_validation", "validation", "fixed"]
    c_grid: Annotated[list[Positive], Field(min_length=1)]
    c_fixed: Positive
    intercept: bool = True
    folds: Annotated[Whole, Field(ge=2)]


class PropagationParams(Section):
    """Evaluation with few labels: label propagation on the graph of all training images, then logistic regression.

    Each pair of a number of neighbours `k` and a share `alpha` that an image takes from its neighbours is tried. Val
    chooses one of them. The affinity of two images is their cosine to the power of `gamma`.

    `balance` sets how the scores of the classes compare. `equal` gives all classes the same mass, for a training part
    with about as many images of each class. `none` takes the scores as they are.
    """

    k: list[Count] = Field(default=[5, 10, 20], min_length=1)
    alpha: list[OpenFraction] = Field(default=[0.95, 0.99], min_length=1)
    gamma: Positive = 3.0
    balance: Literal["equal", "none"] = "equal"
    c: Positive = 1.0


# timm's codes: m magnitude, n operations per image, mstd deviation and mmax maximum of the magnitude,
# inc increasing severity, p probability
RAND_AUGMENT = r"rand(-(m\d+|n\d+|mstd\d+(\.\d+)?|mmax\d+|inc[01]|p\d+(\.\d+)?))+"


def _known_to_timm(given: str) -> str:
    if not re.fullmatch(RAND_AUGMENT, given):
        raise ValueError("give timm's description, like rand-m9-mstd0.5-inc1, or null")
    return given


RandAugmentName = Annotated[str, AfterValidator(_known_to_timm)]


class FineTuneParams(TrainingParams):
    """Fine-tuning of the whole encoder with labels, as in MAE and LGP. Probabilities and strengths are timm's.

    `base_lr` may be a list of rates: each is tried, and val chooses one. `from_first_fc` keeps the first layer of the
    arm's contrastive projector between encoder and classifier.
    `rand_augment` is timm's description, e.g. `rand-m9-mstd0.5-inc1`.
    """

    base_lr: Positive | Annotated[list[Positive], Field(min_length=1)]
    layer_decay: PositiveFraction
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pool: Literal["class_token", "average"] = "class_token"
    from_first_fc: bool = False
    crop_scale_min: PositiveFraction = 0.08
    interpolation: Interpolation = "bicubic"
    flip_p: Fraction = 0.5
    rand_augment: RandAugmentName | None = None
    random_erasing: Fraction = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _projector_takes_the_class_token(self) -> Self:
        if self.from_first_fc and self.pool != "class_token":
            raise ValueError("from_first_fc: the projector was trained on the class token: set pool to class_token")
        return self

    @property
    def base_lrs(self) -> list[float]:
        """The rates to choose from, per 256 images."""
        return self.base_lr if isinstance(self.base_lr, list) else [self.base_lr]

    @property
    def views(self) -> ViewParams:
        """Crops and flips. timm applies all other augmentations."""
        return ViewParams(crop_scale_min=self.crop_scale_min, interpolation=self.interpolation, flip_p=self.flip_p)


class SemiParams(TrainingParams):
    """Semi-supervised fine-tuning (Semi-ViT, Cai et al. 2022): it goes on from fine-tuning, with unlabelled images.

    An epoch is a pass over the unlabelled images. A step takes `batch_size` labelled images and `unlabelled_ratio`
    times as many unlabelled ones. A teacher predicts the unlabelled ones. The student learns predictions with a
    probability of `threshold` or more. Their loss has the weight `weight`. The teacher is the exponential average of
    the student over about `teacher_share` of the steps. All other keys of the images and the model (crops, flips, drop
    path, label smoothing) are those of `finetune.LABELS`.

    `base_lr` is per 256 labelled images; null: the rate that val chose for fine-tuning the same arm.

    `rand_augment` and `color_jitter` change the student's view of an unlabelled image. `color_jitter` is the strength
    of brightness, contrast and saturation. `mixing` says how unlabelled images are mixed in pairs. `both` draws mixup
    or cutmix for each image.
    """

    base_lr: Positive | None = None
    layer_decay: PositiveFraction = 0.75
    unlabelled_ratio: Count = 5
    threshold: Fraction = 0.6
    weight: NonNegative = 5.0
    teacher_share: PositiveFraction = 0.1
    mixing: Literal["both", "mixup", "cutmix", "none"] = "both"
    rand_augment: RandAugmentName | None = "rand-m9-mstd0.5-inc1"
    color_jitter: Fraction = 0.0

    @model_validator(mode="after")
    def _there_is_a_partner(self) -> Self:
        if self.mixing != "none" and self.unlabelled_ratio < 2:
            raise ValueError(
                f"mixing {self.mixing} needs an unlabelled_ratio of 2 or more, because an image is mixed with another "
                "of the same labelled one: raise it, or set mixing to none"
            )
        return self

    @property
    def strong(self) -> ViewParams:
        """The colours of the student's view. timm's RandAugment comes before, crop and flip come first."""
        strength = self.color_jitter
        return ViewParams(crop_scale_min=1.0, jitter_p=1.0, brightness=strength, contrast=strength, saturation=strength)
