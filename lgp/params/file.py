"""The parameter file: loading and checking. The whole file is checked before any work."""

import difflib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from lgp.errors import LgpError, one_line
from lgp.params.arms import BASELINES
from lgp.params.data import DataParams
from lgp.params.evaluate import (
    FeatureParams,
    FewShotParams,
    FineTuneParams,
    LinearParams,
    PropagationParams,
    SemiParams,
)
from lgp.params.graft import GraftParams
from lgp.params.labels import ALL_LABELS, LabelsParams
from lgp.params.model import ModelParams
from lgp.params.pretrain import ClParams, ConflictParams, ContrastiveParams, JointParams, MimParams, ReverseParams
from lgp.params.run import RunParams
from lgp.params.section import ArmName, LabelsName, Section, Whole
from lgp.params.selection import SelectionParams
from lgp.params.sense import MAX_IMAGE_SIZE, faults, truths_for_numbers

# key of an earlier version → its place now
MOVED = {
    "data.few_label_shares": "labels.shares",
    "data.few_label_shots": "labels.shots",
    "data.few_label_lists": "labels.lists",
    "data.few_label_subsets": "labels.subsets",
    "data.leaks": "labels.leaks",
    "data.near_duplicate_bits": "labels.near_duplicate_bits",
    "report": "arms, which names pixels and random too",
}
# what a union's branch takes, by pydantic's error where another kind is given
KINDS = {
    "string_type": "a path, a name",
    "model_type": "a mapping such as {folder: raw/}",
    "float_type": "a number",
    "list_type": "a list of numbers",
}
Loc = tuple[str | int, ...]


def selected_tasks(labels: str) -> tuple[str, str]:
    """Return the tasks of selected images: regression on their labels, and on these labels propagated."""
    return f"selected-{labels}", f"selected-{labels}-propagated"


class Params(Section):
    """The whole file."""

    seed: Annotated[Whole, Field(ge=0, lt=2**32)]
    arms: Annotated[list[ArmName], Field(min_length=1)]
    few_labels: Annotated[list[LabelsName], Field(min_length=1)]
    propagated: list[LabelsName] = Field(default_factory=list)
    selected: list[LabelsName] = Field(default_factory=list)
    finetuned: list[LabelsName]
    finetuned_arms: list[ArmName]
    semi_supervised: list[LabelsName] = Field(default_factory=list)
    data: DataParams
    labels: LabelsParams
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
    propagation: PropagationParams = PropagationParams()
    selection: SelectionParams = SelectionParams()
    finetune: dict[LabelsName, FineTuneParams] = Field(default_factory=dict)
    semi: SemiParams | None = None
    conflict: ConflictParams = ConflictParams()
    run: RunParams = RunParams()

    def tasks_of(self, arm: str) -> list[str]:
        """Return the names of an arm's tasks."""
        tuned = [f"finetune-{labels}" for labels in self.finetuned]
        tuned += [f"semi-{labels}" for labels in self.semi_supervised]
        few = [f"fewshot-{labels}" for labels in self.few_labels]
        propagated = [f"propagate-{labels}" for labels in self.propagated]
        selected = [task for labels in self.selected for task in selected_tasks(labels)]
        return ["linear", *few, *propagated, *selected, *(tuned if arm in self.finetuned_arms else [])]

    def recipe(self, labels: str) -> FineTuneParams:
        """Return the recipe `finetune.LABELS`. If there is none, raise `LgpError` with the existing recipes."""
        if labels not in self.finetune:
            raise LgpError(f"there is no recipe finetune.{labels}, only {', '.join(self.finetune) or 'none'}: add it")
        return self.finetune[labels]

    def semi_recipe(self) -> SemiParams:
        """Return the section `semi`. Raise `LgpError` if there is none."""
        if self.semi is None:
            raise LgpError("there is no section semi: add it (the preset digits has one)")
        return self.semi

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        size, patch = self.data.image_size, self.model.patch_size
        if size > MAX_IMAGE_SIZE:
            raise ValueError(f"data.image_size {size} is above {MAX_IMAGE_SIZE} pixels: lower it (ImageNet: 224)")
        divisors = [d for d in range(1, size + 1) if size % d == 0 and d * d * self.data.channels > 1]
        if patch not in divisors:
            raise ValueError(
                f"model.patch_size {patch} does not divide data.image_size {size} into patches of two values or more: "
                f"choose one of {divisors}"
            )
        for name, ratio in (("mim", self.mim.mask_ratio), ("contrastive", self.contrastive.mask_ratio)):
            if int((size // patch) ** 2 * (1 - ratio)) < 1:
                raise ValueError(
                    f"{name}.mask_ratio {ratio} leaves none of the {(size // patch) ** 2} patches: lower it, or raise "
                    f"data.image_size {size}"
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
    def _low_rank_updates_have_blocks(self) -> Self:
        graft, model = self.graft, self.model
        if (lora := graft.low_rank) is None:
            return self
        if lora.rank >= model.width:
            raise ValueError(f"graft.lora.rank {lora.rank} is no low rank at model.width {model.width}: lower it")
        adapted, frozen, anew = model.depth - lora.free_blocks, graft.cut("freeze") or 0, graft.cut("scratch_end")
        if adapted <= frozen:
            raise ValueError(
                f"graft.lora.free_blocks {lora.free_blocks} and {frozen} frozen blocks leave none of {model.depth} for "
                "low-rank updates: lower one of them, or drop lora from policy"
            )
        if anew is not None and anew < adapted:
            raise ValueError(
                f"scratch_end starts the blocks from {anew} on anew, which must learn freely: raise "
                f"graft.lora.free_blocks {lora.free_blocks} to {model.depth - anew}"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_there(self) -> Self:
        valid = [*self.labels.names, ALL_LABELS]
        for key in ("few_labels", "propagated", "selected", "finetuned", "semi_supervised"):
            names = getattr(self, key)
            for name in names:
                if name not in valid:
                    raise ValueError(
                        f"{key} names {name}, valid are {', '.join(valid)}: choose of these, or add a share, "
                        "a shot or a list to labels.shares, labels.shots or labels.lists"
                    )
                if names.count(name) > 1:
                    raise ValueError(f"{key} names {name} twice")
                if key == "finetuned" and name not in self.finetune:
                    raise ValueError(f"finetuned names {name}, but there is no recipe finetune.{name}: add it")
                if key == "semi_supervised" and name not in self.finetuned:
                    raise ValueError(
                        f"semi_supervised names {name}, which is not among finetuned, and it starts from that: add it "
                        "there, or drop it here"
                    )
        if self.semi_supervised and self.semi is None:
            raise ValueError(
                f"semi_supervised names {self.semi_supervised[0]}, but there is no section semi: add it (the preset "
                "digits has one)"
            )
        if self.features.blocks > self.model.depth:
            raise ValueError(f"features.blocks {self.features.blocks} is more than model.depth {self.model.depth}")
        return self

    @model_validator(mode="after")
    def _arms_are_there(self) -> Self:
        for key in ("arms", "finetuned_arms"):
            names = getattr(self, key)
            twice = {arm for arm in names if names.count(arm) > 1}
            if twice:
                raise ValueError(f"{key} names {', '.join(sorted(twice))} twice")
        if set(self.arms) <= set(BASELINES):
            raise ValueError(f"arms names only baselines ({', '.join(self.arms)}): add mim, cl, graft or another arm")
        for arm in self.finetuned_arms:
            if arm not in self.arms:
                raise ValueError(f"finetuned_arms names {arm}, which is not among arms: add it there, or drop it here")
            if arm == "pixels":
                raise ValueError("finetuned_arms names pixels, which has no encoder to fine-tune: drop it")
        for arm in ("joint", "reverse"):
            if arm in self.arms and getattr(self, arm) is None:
                raise ValueError(f"arms names {arm}, but there is no section {arm}: add it (the preset digits has one)")
        return self

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if found := list(faults(self)):
            raise ValueError("; ".join(found))
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _numbers_are_numbers(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        params = validate(values)
        truths = sorted(truths_for_numbers(values, params.model_dump()))
        if truths:
            raise ValueError(f"{', '.join(truths)}: true and false are no numbers: give a number")
        return params


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML's safe loader, but a repeated key is an error. PyYAML itself takes the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping. Raise an error at a repeated key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return super().construct_mapping(node, deep)


def section_values(params: Params, sections: Iterable[str]) -> dict[str, Any]:
    """Return sections as plain values. `data.source` gives that key alone, `finetune.10pct` that recipe if any."""
    values = params.model_dump(mode="json", include={section.partition(".")[0] for section in sections})
    chosen: dict[str, Any] = {}
    for section in sections:
        name, _, key = section.partition(".")
        if not key:
            chosen[name] = values[name]
        elif key in values[name]:
            chosen.setdefault(name, {})[key] = values[name][key]
    return chosen


def restricted(params: Params, sections: Iterable[str]) -> Params:
    """Return only the sections that a stage reads, and `run`. Any other section raises `AttributeError`.

    A stage therefore cannot depend on a key that `dvc.yaml` does not list for it.
    """
    names = {section.partition(".")[0] for section in sections} | {"run"}
    keys: dict[str, list[str]] = {}
    for name, _, key in (section.partition(".") for section in sections):
        keys.setdefault(name, []).extend([key] if key else [])
    visible = Params.model_construct()
    kept = {name: getattr(params, name) for name in names}
    for name, chosen in keys.items():
        if chosen and isinstance(kept[name], dict):
            kept[name] = {key: value for key, value in kept[name].items() if key in chosen}
        elif chosen:
            kept[name] = kept[name].model_copy()
            of_section = kept[name].__dict__
            for key in of_section.keys() - set(chosen):
                del of_section[key]
    visible.__dict__.clear()
    visible.__dict__.update(kept)
    return visible


def load_params(path: Path) -> Params:
    """Read and check a parameter file.

    Raises:
        LgpError: the file is missing, is not YAML, has an unknown key, a value out of range, or
            sections that contradict each other. The message names key, value and what is valid.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise LgpError(
            f"cannot read the parameter file {path} ({getattr(e, 'strerror', 'not text')}): go to the project's "
            "folder, make one with `lgp init FOLDER`, or pass --params FILE"
        ) from None
    return parse_params(text, path)


def parse_params(text: str, path: Path) -> Params:
    """Check the text of a parameter file. `LgpError` says what is wrong in `path`."""
    try:
        values = yaml.load(text, _UniqueKeys)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise LgpError(f"{path} is not valid YAML{place}: {e.problem}") from None
    except yaml.YAMLError as e:
        raise LgpError(f"{path} is not valid YAML: {one_line(e)}") from None
    if not isinstance(values, dict):
        raise LgpError(f"{path} must hold sections ({', '.join(Params.model_fields)}), not {type(values).__name__}")
    return check_values(values, path)


def check_values(values: dict[str, Any], path: Path) -> Params:
    """Check the nested values of a parameter file. `LgpError` says what is wrong in `path`."""
    try:
        return Params.model_validate(values)
    except ValidationError as e:
        raise LgpError(f"{path}: " + "; ".join(_explain(error, values) for error in _fitting(e.errors()))) from None


def _fitting(errors: Sequence[Any]) -> list[Any]:
    """Return pydantic's errors, one branch of each union: that of the kind that was given.

    Pydantic tries every branch, and reports the errors of all.
    """
    of_union: dict[Loc, list[Any]] = {}
    for error in errors:
        branch = _branch_at(error["loc"])
        of_union.setdefault(error["loc"] if branch is None else error["loc"][:branch], []).append(error)
    return list(chain.from_iterable(_of_one_branch(place, found) for place, found in of_union.items()))


def _of_one_branch(place: Loc, errors: list[Any]) -> list[Any]:
    kinds = [error for error in errors if len(error["loc"]) == len(place) + 1 and error["type"].endswith("_type")]
    if not kinds or errors[0]["loc"] == place:
        return errors
    if len(kinds) < len(errors):
        return [error for error in errors if error not in kinds]
    valid = " or ".join(KINDS.get(error["type"], error["msg"]) for error in kinds)
    return [{"loc": place, "type": "kind", "msg": f"give {valid}", "input": errors[0]["input"]}]


def _explain(error: Any, values: Any) -> str:
    """Return one pydantic error as `section.key: what is wrong, what is valid`."""
    key = _key(error["loc"], values)
    if error["type"] == "extra_forbidden":
        if key in MOVED:
            return f"unknown key {key!r}: it is now {MOVED[key]}"
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


def _key(loc: Loc, values: Any) -> str:
    """Return the key of an error, as in the file. A single value that stands for a list has no number."""
    branch, parts = _branch_at(loc), []
    for place, part in enumerate(loc):
        if place == branch or (isinstance(part, int) and not isinstance(values, list)):
            continue
        parts.append(str(part))
        if isinstance(values, list):
            # a list that is too short has no such value
            values = values[part] if isinstance(part, int) and part < len(values) else None
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return ".".join(parts)


def _branch_at(loc: Loc) -> int | None:
    """Return the place in an error's path that names a branch of a union, None if there is none."""
    kind: Any = Params
    for place, part in enumerate(loc):
        branches = [_bare(branch) for branch in get_args(kind) if branch is not NoneType]
        if get_origin(kind) in (Union, UnionType) and len(branches) > 1:
            return place
        kind = branches[0] if get_origin(kind) in (Union, UnionType) else kind
        if isinstance(kind, type) and issubclass(kind, Section):
            field = kind.model_fields.get(str(part))
            kind = _bare(field.annotation) if field else None
        else:  # of a list, or of a mapping with free names
            kind = _bare(get_args(kind)[-1]) if get_args(kind) else None
    return None


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _section_at(loc: Loc) -> type[Section]:
    section: type[Section] = Params
    for part in loc:
        if str(part) not in section.model_fields:  # a name that the user chose, e.g. of a recipe
            continue
        annotation = section.model_fields[str(part)].annotation
        section = _section_in(annotation) or section
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the section in an annotation, however deep it stands in lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)
