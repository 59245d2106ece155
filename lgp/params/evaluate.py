"""Sections `features`, `linear`, `fewshot` and `finetune`: evaluation."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lgp.params.pretrain import TrainingParams, ViewParams
from lgp.params.section import Count, Fraction, Interpolation, NonNegative, OpenFraction, Positive, Section, Whole


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
    crop_scale_min: Annotated[float, Field(gt=0, le=1)]
    flip_p: Fraction
    knn_k: Count
    knn_temperature: Positive


class FewShotParams(Section):
    """Evaluation with few labels: logistic regression on frozen features.

    `choose` sets how the inverse regularisation strength C is chosen. `cross_validation` uses only the labelled images;
    if a class has a single one, C is `c_fixed`. `validation` uses val. `fixed` takes `c_fixed`.
    """

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


class FineTuneParams(TrainingParams):
    """Fine-tuning of the whole encoder with labels, as in MAE and LGP. Probabilities and strengths are timm's.

    `base_lr` may be a list of rates: each is tried, and val chooses one. `from_first_fc` keeps the first layer of the
    arm's contrastive projector between encoder and classifier.
    `rand_augment` is timm's description, e.g. `rand-m9-mstd0.5-inc1`.
    """

    base_lr: Positive | Annotated[list[Positive], Field(min_length=1)]
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pool: Literal["class_token", "average"] = "class_token"
    from_first_fc: bool = False
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    interpolation: Interpolation = "bicubic"
    flip_p: Fraction = 0.5
    rand_augment: str | None = None
    random_erasing: Fraction = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @field_validator("rand_augment")
    @classmethod
    def _timm_knows_it(cls, given: str | None) -> str | None:
        if given is not None and not re.fullmatch(RAND_AUGMENT, given):
            raise ValueError("give timm's description, like rand-m9-mstd0.5-inc1, or null")
        return given

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
