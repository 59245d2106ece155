"""Section `graft`: the arm to graft on, and the policies."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from lgp.params.pretrain import TrainingParams
from lgp.params.section import ArmName, Count, Positive, PositiveFraction, Rates, Section, Whole, as_list

Policy = Literal["stage_lr", "layer_decay", "freeze", "l1", "scratch_end", "cl_end", "lora"]


class StageLrParams(Section):
    """One base learning rate per group of blocks, lowest group first. All groups have one size (LGP, section 3.3)."""

    base_lrs: Rates


class LayerDecayParams(Section):
    """A base learning rate for the heads and the final norm. Each block below multiplies it by `decay` once more."""

    base_lr: Positive
    decay: PositiveFraction


class LowerBlocks(Section):
    """A cut through the encoder. The lower part is the embeddings and the lowest `lower_blocks` blocks."""

    lower_blocks: Annotated[Whole, Field(ge=0)]


class L1Params(LowerBlocks):
    """Weight of the L1 penalty: the summed L1 distance of the lower part from its starting weights."""

    weight: Positive


class LoraParams(Section):
    """Low-rank updates of queries and values, in all blocks but the last `free_blocks` (ExPLoRA, Khanna et al. 2024).

    An update has the rank `rank` and is scaled by `alpha` / `rank`.
    """

    rank: Count
    alpha: Positive
    free_blocks: Annotated[Whole, Field(ge=0)]


class GraftParams(TrainingParams):
    """Contrastive learning on top of another arm's encoder.

    `policy` names one or more of the sections below. It names exactly one of `stage_lr` and `layer_decay`. It names at
    most one of `scratch_end` and `cl_end`. Sections that it does not name are not used.
    """

    start: ArmName
    end: ArmName
    head_warmup_epochs: Annotated[Whole, Field(ge=0)] = 0
    policy: Annotated[tuple[Policy, ...], BeforeValidator(as_list), Field(min_length=1)]
    stage_lr: StageLrParams | None = None
    layer_decay: LayerDecayParams | None = None
    freeze: LowerBlocks | None = None
    l1: L1Params | None = None
    scratch_end: LowerBlocks | None = None
    cl_end: LowerBlocks | None = None
    lora: LoraParams | None = None

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
        regularized, frozen = self.cut("l1"), self.cut("freeze")
        if regularized is not None and frozen is not None and regularized <= frozen:
            raise ValueError("l1 covers only frozen blocks: raise l1.lower_blocks, or drop l1 from policy")
        if regularized is not None and "lora" in self.policy:
            raise ValueError(
                "policy names both l1 and lora: lora holds the weights of the lower blocks by its rank already, drop l1"
            )
        return self

    @property
    def low_rank(self) -> LoraParams | None:
        """The section `lora`, None if the key `policy` does not name it."""
        return self.lora if "lora" in self.policy else None

    def cut(self, policy: str) -> int | None:
        """Return `lower_blocks` of freeze, l1, scratch_end or cl_end, or None if the key `policy` does not name it."""
        section: LowerBlocks | None = getattr(self, policy)
        return section.lower_blocks if section and policy in self.policy else None
