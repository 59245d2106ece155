"""The parameter file: one section per stage plus small shared ones, checked whole before any work."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from lgp.arms import TRAINED
from lgp.errors import LgpError

Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


def _whole(value: Any) -> Any:
    """Read `1e2`, which PyYAML takes for text, as the whole number it is."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return int(number) if isinstance(value, str) and number.is_integer() else value


def _several(value: Any) -> Any:
    """Take one name for a list of one."""
    return (value,) if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1)]
Rates = Annotated[list[NonNegative], Field(min_length=1)]
# no hyphen: file names are ARM-TASK
LabelsName = Annotated[str, Field(pattern="^[a-z0-9_]+$")]
ALL_LABELS = "all"
ArmName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


def shot_name(shot: int) -> str:
    """Name the few-label subsets of so many images of each class."""
    return f"{shot}shot"


Policy = Literal["stage_lr", "layer_decay", "freeze", "l1", "scratch_end", "cl_end"]


class Section(BaseModel):
    """A section of the file: unknown keys and non-finite numbers are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataParams(Section):
    """Where the images come from and how they are split."""

    source: str
    image_size: Count
    channels: Literal[1, 3]
    test_share: OpenShare
    val_share: OpenShare
    few_label_shares: dict[LabelsName, OpenShare]
    few_label_shots: list[Count] = []
    few_label_lists: dict[LabelsName, Annotated[tuple[str, ...], BeforeValidator(_several), Field(min_length=1)]] = {}
    few_label_subsets: Annotated[Whole, Field(ge=5)]
    leaks: Literal["report", "drop_test", "drop_train"] = "report"
    near_duplicate_bits: Annotated[Whole, Field(ge=0, le=32)] | None = 4
    max_unreadable_share: Share
    max_train_images: Count | None = None
    max_test_images: Count | None = None
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    mean: list[Share] | None = None
    std: list[Positive] | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = self.few_label_names
        for name in names:
            if names.count(name) > 1 or name == ALL_LABELS:
                raise ValueError(
                    f"few_label_shares, few_label_shots and few_label_lists name {name} twice: each name once"
                    if name != ALL_LABELS
                    else "all means all labels: call the share or list otherwise"
                )
        return self

    @property
    def few_label_names(self) -> list[str]:
        """The names of all few-label subsets that `prepare` makes."""
        return [*self.few_label_shares, *(shot_name(shot) for shot in self.few_label_shots), *self.few_label_lists]

    @model_validator(mode="after")
    def _statistics_match_channels(self) -> Self:
        for name in ("mean", "std"):
            given = getattr(self, name)
            if given is not None and len(given) != self.channels:
                raise ValueError(
                    f"{name} has {len(given)} values for {self.channels} channels: give one a channel, or null"
                )
        return self


class ModelParams(Section):
    """The encoder: a plain ViT with a class token."""

    patch_size: Count
    width: Count
    depth: Count
    heads: Count

    @model_validator(mode="after")
    def _width_divides(self) -> Self:
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which 2D sin-cos positions need")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} do not divide width {self.width}: choose a divisor")
        return self


class ViewParams(Section):
    """Random views. Probabilities, and for the two views of contrastive learning one value each.

    Jitter strengths are torchvision's: a factor is drawn from [1 - s, 1 + s], the hue shift from
    [-s, s] of a full turn.
    """

    crop_scale_min: Annotated[float, Field(gt=0, le=1)]
    flip_p: Share = 0.0
    jitter_p: Share = 0.0
    brightness: Share = 0.0
    contrast: Share = 0.0
    saturation: Share = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    grayscale_p: Share = 0.0
    blur_p: tuple[Share, Share] = (0.0, 0.0)
    solarize_p: tuple[Share, Share] = (0.0, 0.0)


class VicregWeights(Section):
    """Weights of VICReg's three terms (Bardes et al. 2022, section 4.1)."""

    invariance: NonNegative = 25.0
    variance: NonNegative = 25.0
    covariance: NonNegative = 1.0


class ContrastiveParams(Section):
    """Objective, heads and views of contrastive learning, shared by the CL baseline and the graft.

    `temperature` is of mocov3 and simclr, `predictor_hidden` and `momentum` of mocov3, `vicreg` of vicreg.
    """

    objective: Literal["mocov3", "simclr", "vicreg"] = "mocov3"
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    vicreg: VicregWeights = VicregWeights()
    projector_hidden: Count
    projector_dim: Count
    predictor_hidden: Count
    temperature: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)]
    freeze_patch_embed: bool
    views: ViewParams


class TrainingParams(Section):
    """What every pre-training has. Learning rates are per 256 images: peak lr = base_lr × batch / 256."""

    epochs: Count
    batch_size: Annotated[Whole, Field(ge=2)]
    warmup_epochs: NonNegative
    weight_decay: NonNegative

    @model_validator(mode="after")
    def _warmup_within_epochs(self) -> Self:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} must be below epochs {self.epochs}")
        return self


class MimParams(TrainingParams):
    """The masked autoencoder (MAE, He et al. 2022)."""

    base_lr: Positive
    mask_ratio: OpenShare
    decoder_width: Count
    decoder_depth: Count
    decoder_heads: Count
    crop_scale_min: Annotated[float, Field(gt=0, le=1)]
    flip_p: Share

    @model_validator(mode="after")
    def _decoder_width_divides(self) -> Self:
        if self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width {self.decoder_width} must be a multiple of 4 and of decoder_heads {self.decoder_heads}"
            )
        return self

    @property
    def views(self) -> ViewParams:
        """MAE's augmentation: crop and flip, nothing else (appendix A.1)."""
        return ViewParams(crop_scale_min=self.crop_scale_min, flip_p=self.flip_p)


class ClParams(TrainingParams):
    """MoCo v3 from scratch: the contrastive baseline."""

    base_lr: Positive


class StageLrParams(Section):
    """One base learning rate per equal group of blocks, from the lowest (LGP, section 3.3)."""

    base_lrs: Rates


class LayerDecayParams(Section):
    """A base learning rate for heads and final norm, `decay` times less with every block below."""

    base_lr: Positive
    decay: Annotated[float, Field(gt=0, le=1)]


class LowerBlocks(Section):
    """Where the encoder is cut: that many of the lowest blocks, with the embeddings, are the lower part."""

    lower_blocks: Annotated[Whole, Field(ge=0)]


class L1Params(LowerBlocks):
    """Weight of the summed L1 distance of the lower part to the weights that it started from."""

    weight: Positive


class GraftParams(TrainingParams):
    """Contrastive learning on top of another arm's encoder.

    `policy` names one or more of the sections below; exactly one of `stage_lr` and `layer_decay` is among them,
    `scratch_end` and `cl_end` exclude each other. Sections that it does not name are not used.
    """

    start: ArmName
    end: ArmName
    policy: Annotated[tuple[Policy, ...], BeforeValidator(_several), Field(min_length=1)]
    stage_lr: StageLrParams | None = None
    layer_decay: LayerDecayParams | None = None
    freeze: LowerBlocks | None = None
    l1: L1Params | None = None
    scratch_end: LowerBlocks | None = None
    cl_end: LowerBlocks | None = None

    @model_validator(mode="after")
    def _policies_agree(self) -> Self:
        if "graft" in (self.start, self.end):
            raise ValueError("start and end are arms to graft on, never graft itself")
        absent = [name for name in self.policy if getattr(self, name) is None]
        if absent:
            raise ValueError(f"policy names {absent[0]}, but graft has no section {absent[0]}: add it")
        if ("stage_lr" in self.policy) == ("layer_decay" in self.policy):
            raise ValueError(
                f"policy {', '.join(self.policy)} must name exactly one of stage_lr and layer_decay, which give the "
                "learning rates"
            )
        if "scratch_end" in self.policy and "cl_end" in self.policy:
            raise ValueError("policy names both scratch_end and cl_end: the upper blocks start anew or from an arm")
        if "cl_end" in self.policy and self.end == self.start:
            raise ValueError(
                f"policy cl_end takes the upper blocks from end, which is start, {self.start}: set it to cl"
            )
        if "cl_end" not in self.policy and self.end != self.start:
            raise ValueError(f"end {self.end} is read by the policy cl_end only: add it, or set end to {self.start}")
        end = self.cut("cl_end") if self.cut("scratch_end") is None else self.cut("scratch_end")
        for name in ("freeze", "l1"):
            reach = self.cut(name)
            if reach is not None and end is not None and reach > end:
                raise ValueError(
                    f"{name}.lower_blocks {reach} reaches into the blocks that do not start from {self.start}, from "
                    f"{end} on: lower it"
                )
        pulled, fixed = self.cut("l1"), self.cut("freeze")
        if pulled is not None and fixed is not None and pulled <= fixed:
            raise ValueError("l1 pulls only what freeze fixes anyway: raise l1.lower_blocks, or drop l1 from policy")
        return self

    def cut(self, policy: str) -> int | None:
        """Return `lower_blocks` of freeze, l1, scratch_end or cl_end, None where `policy` does not name it."""
        section: LowerBlocks | None = getattr(self, policy)
        return section.lower_blocks if section and policy in self.policy else None


class JointParams(TrainingParams):
    """The paper's control: the losses of MIM (times `mim_weight`) and CL summed on one encoder."""

    base_lr: Positive
    mim_weight: Positive = 1.0


class ReverseParams(TrainingParams):
    """The paper's control: MIM on top of the CL encoder, one base learning rate per equal group of blocks."""

    base_lrs: Rates


class FeatureParams(Section):
    """Frozen features: of the class token or the average patch, after the last `blocks` blocks together."""

    pool: Literal["class_token", "average"] = "class_token"
    blocks: Count = 1
    by_depth: bool = True
    dtype: Literal["float16", "float32"] = "float32"


class LinearParams(Section):
    """Evaluation with all labels: linear heads by SGD and k-NN, on frozen features.

    Every pair of `base_lrs` (per 256 images) and `weight_decays` is a head; the best on val is reported. `method`
    is `sweep`, on cached features, or `augmented`, on those of random crops and flips.
    """

    method: Literal["sweep", "augmented"] = "sweep"
    base_lrs: Annotated[list[Positive], Field(min_length=1)]
    weight_decays: Annotated[list[NonNegative], Field(min_length=1)]
    epochs: Count
    batch_size: Annotated[Whole, Field(ge=2)]
    batch_norm: bool
    crop_scale_min: Annotated[float, Field(gt=0, le=1)]
    flip_p: Share
    knn_k: Count
    knn_temperature: Positive


class FewShotParams(Section):
    """Evaluation with few labels: logistic regression on frozen features.

    `choose` says where the inverse strength C comes from: `cross_validation` within the labelled images (`c_fixed`
    where a class has a single one), `validation` on val, or `fixed`: `c_fixed`.
    """

    scaling: Literal["standardized", "normalized"]
    choose: Literal["cross_validation", "validation", "fixed"]
    c_grid: Annotated[list[Positive], Field(min_length=1)]
    c_fixed: Positive
    folds: Annotated[Whole, Field(ge=2)]


# timm's: magnitude, operations an image, deviation and most of the magnitude, increasing severity, probability
RAND_AUGMENT = r"rand(-(m\d+|n\d+|mstd\d+(\.\d+)?|mmax\d+|inc[01]|p\d+(\.\d+)?))+"


class FineTuneParams(TrainingParams):
    """Fine-tuning of the whole encoder with labels, as MAE and LGP do; probabilities and strengths as timm takes them.

    `from_first_fc` keeps the first layer of the arm's contrastive projector between encoder and classifier.
    `rand_augment` is timm's description, e.g. `rand-m9-mstd0.5-inc1`.
    """

    base_lr: Positive
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pool: Literal["class_token", "average"] = "class_token"
    from_first_fc: bool = False
    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.08
    flip_p: Share = 0.5
    rand_augment: str | None = None
    random_erasing: Share = 0.0
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
    def views(self) -> ViewParams:
        """Crops and flips; the rest is timm's."""
        return ViewParams(crop_scale_min=self.crop_scale_min, flip_p=self.flip_p)


class ConflictParams(Section):
    """How `lgp conflict` measures: heads fitted to the frozen encoder, then gradients over some batches."""

    head_epochs: Count = 10
    batches: Annotated[Whole, Field(ge=2)] = 200
    batch_size: Annotated[Whole, Field(ge=2)] = 64
    base_lr: Positive = 4e-3


class ReportParams(Section):
    """The report."""

    baselines: list[Literal["pixels", "random"]]


class OnlineKnnParams(Section):
    """k-NN while a pre-training runs: every so many epochs (0: never), on some labelled images and some of val."""

    every_epochs: Annotated[Whole, Field(ge=0)] = 10
    train_images: Count = 256
    val_images: Count = 256


class RunParams(Section):
    """How to run, never what comes out: no stage of dvc.yaml lists this section."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None
    workers: Annotated[Whole, Field(ge=0)] = 0
    decoded_gib: NonNegative = 2.0
    processes: Count = 1
    accumulate: dict[str, Count] = {}
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    save_every_s: Positive = 60.0
    print_every_s: NonNegative = 10.0
    online_knn: OnlineKnnParams = OnlineKnnParams()
    feature_cache_gib: NonNegative = 20.0
    tracking_uri: str | None = None
    experiment: str = "lgp"

    @model_validator(mode="after")
    def _accumulates_masked_modelling_only(self) -> Self:
        for stage, parts in self.accumulate.items():
            if stage not in (*TRAINED, "finetune"):
                raise ValueError(
                    f"accumulate names {stage}, which is no training: choose of {', '.join(TRAINED)}, finetune"
                )
            if parts > 1 and stage not in ("mim", "reverse", "finetune"):
                raise ValueError(
                    f"accumulate.{stage} {parts}: a contrastive loss compares each image with all others of its batch, "
                    "so a batch in parts has another loss: share it among more processes, or lower "
                    f"{stage}.batch_size; mim, reverse and finetune can be accumulated"
                )
        return self


class Params(Section):
    """The whole file."""

    seed: Annotated[Whole, Field(ge=0, lt=2**32)]
    arms: Annotated[list[ArmName], Field(min_length=1)]
    few_labels: Annotated[list[LabelsName], Field(min_length=1)]
    finetuned: list[LabelsName]
    data: DataParams
    model: ModelParams
    contrastive: ContrastiveParams
    mim: MimParams
    cl: ClParams
    graft: GraftParams
    joint: JointParams | None = None
    reverse: ReverseParams | None = None
    features: FeatureParams = FeatureParams()
    linear: LinearParams
    fewshot: FewShotParams
    finetune: dict[LabelsName, FineTuneParams] = {}
    conflict: ConflictParams = ConflictParams()
    report: ReportParams
    run: RunParams = RunParams()

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        size, patch = self.data.image_size, self.model.patch_size
        divisors = [d for d in range(1, size + 1) if size % d == 0 and d * d * self.data.channels > 1]
        if patch not in divisors:
            raise ValueError(
                f"model.patch_size {patch} does not divide data.image_size {size} into patches of two values or more: "
                f"choose one of {divisors}"
            )
        for name, ratio in (("mim", self.mim.mask_ratio), ("contrastive", self.contrastive.mask_ratio)):
            if int((size // patch) ** 2 * (1 - ratio)) < 1:
                raise ValueError(
                    f"{name}.mask_ratio {ratio} leaves none of the {(size // patch) ** 2} patches: lower it"
                )
        return self

    @model_validator(mode="after")
    def _blocks_are_there(self) -> Self:
        graft, depth = self.graft, self.model.depth
        groups = {"reverse.base_lrs": self.reverse.base_lrs if self.reverse else []}
        if graft.stage_lr and "stage_lr" in graft.policy:
            groups |= {"graft.stage_lr.base_lrs": graft.stage_lr.base_lrs}
        for name, rates in groups.items():
            if rates and depth % len(rates):
                raise ValueError(
                    f"model.depth {depth} cannot be cut into the {len(rates)} equal groups of {name}: "
                    "give a number of rates that divides the depth"
                )
        for name in ("freeze", "l1", "scratch_end", "cl_end"):
            cut = graft.cut(name)
            if cut is not None and cut > depth:
                raise ValueError(f"graft.{name}.lower_blocks {cut} is more than model.depth {depth}")
        return self

    @model_validator(mode="after")
    def _labels_are_there(self) -> Self:
        valid = self.data.few_label_names
        for key, names, more in (("few_labels", self.few_labels, []), ("finetuned", self.finetuned, [ALL_LABELS])):
            for name in names:
                if name not in [*valid, *more]:
                    raise ValueError(
                        f"{key} names {name}, valid are {', '.join([*valid, *more])}: choose of these, or add a share, "
                        "a shot or a list to data.few_label_shares, few_label_shots or few_label_lists"
                    )
                if names.count(name) > 1:
                    raise ValueError(f"{key} names {name} twice")
                if key == "finetuned" and name not in self.finetune:
                    raise ValueError(f"finetuned names {name}, but there is no recipe finetune.{name}: add it")
        if self.features.blocks > self.model.depth:
            raise ValueError(f"features.blocks {self.features.blocks} is more than model.depth {self.model.depth}")
        return self

    @model_validator(mode="after")
    def _arms_are_there(self) -> Self:
        twice = {arm for arm in self.arms if self.arms.count(arm) > 1}
        if twice:
            raise ValueError(f"arms names {', '.join(sorted(twice))} twice")
        for name in ("pixels", "random"):
            if name in self.arms:
                raise ValueError(f"arms names {name}, which is a baseline of the report: call the arm otherwise")
        for arm in ("joint", "reverse"):
            if arm in self.arms and getattr(self, arm) is None:
                raise ValueError(f"arms names {arm}, but there is no section {arm}: add it (the preset digits has one)")
        return self


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of two equal keys, made to refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, each key once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def section_values(params: Params, sections: Iterable[str]) -> dict[str, Any]:
    """Return sections as plain values; `finetune.10pct` is that recipe alone, nothing where there is none."""
    values = params.model_dump(mode="json", include={section.partition(".")[0] for section in sections})
    chosen: dict[str, Any] = {}
    for section in sections:
        name, _, key = section.partition(".")
        if not key:
            chosen[name] = values[name]
        elif key in values[name]:
            chosen.setdefault(name, {})[key] = values[name][key]
    return chosen


def load_params(path: Path) -> Params:
    """Read and check a parameter file.

    Raises:
        LgpError: the file is missing, is not YAML, has an unknown key, a value out of range, or
            sections that contradict each other; the message names key, value and what is valid.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise LgpError(
            f"cannot read the parameter file {path} ({getattr(e, 'strerror', 'not text')}): go to the project's "
            "folder, run `lgp preset use digits` there if it has none, or pass --params FILE"
        ) from None
    try:
        values = yaml.load(text, _UniqueKeys)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise LgpError(f"{path} is not valid YAML{place}: {e.problem}") from None
    except yaml.YAMLError as e:
        raise LgpError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise LgpError(f"{path} must hold sections ({', '.join(Params.model_fields)}), not {type(values).__name__}")
    try:
        return Params.model_validate(values)
    except ValidationError as e:
        raise LgpError(f"{path}: " + "; ".join(_explain(error) for error in e.errors())) from None


def _explain(error: Any) -> str:
    """Say one pydantic error as `section.key: what is wrong, what is valid`."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        valid = list(_section_at(error["loc"][:-1]).model_fields)
        close = difflib.get_close_matches(str(error["loc"][-1]), valid, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
        return f"unknown key {key!r}: {hint}"
    if error["type"] == "missing":
        return f"missing key {key!r}"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if isinstance(error["input"], dict) else f"{error['input']!r} is not valid: "
    return f"{key}: {given}{message}" if key else message


def _section_at(loc: tuple[str | int, ...]) -> type[Section]:
    section: type[Section] = Params
    for part in loc:
        if str(part) not in section.model_fields:  # a name of the user's, of a section of its kind
            continue
        annotation = section.model_fields[str(part)].annotation
        section = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, Section))
    return section
