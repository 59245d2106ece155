"""Section `run`: how a stage runs, not what it computes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lgp.params.arms import TRAINED, TUNING
from lgp.params.section import ArmName, Count, NonNegative, Positive, Section, Whole


class OnlineKnnParams(Section):
    """k-NN during pre-training: every `every_epochs` epochs (0: never), on some labelled images and some of val."""

    every_epochs: Annotated[Whole, Field(ge=0)] = 10
    train_images: Count = 256
    val_images: Count = 256


class RunParams(Section):
    """How a stage runs, not what it computes. No stage of dvc.yaml lists this section."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None
    workers: Annotated[Whole, Field(ge=0)] = 0
    decoded_gib: NonNegative = 2.0
    processes: Count = 1
    lost_after_s: Annotated[float, Field(ge=5)] = 60.0  # a sign of life comes every second
    accumulate: dict[str, Count] = Field(default_factory=dict)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    save_every_s: Positive = 60.0
    print_every_s: NonNegative = 10.0
    online_knn: OnlineKnnParams = OnlineKnnParams()
    feature_cache_gib: NonNegative = 20.0
    tracking_uri: str | None = None
    experiment: str = "lgp"
    accept: list[ArmName] = Field(default_factory=list)

    @model_validator(mode="after")
    def _accepts_trained_arms_only(self) -> Self:
        for arm in self.accept:
            if arm not in TRAINED:
                raise ValueError(f"accept names {arm}, which is not trained here: choose of {', '.join(TRAINED)}")
        return self

    @model_validator(mode="after")
    def _accumulates_masked_modelling_only(self) -> Self:
        for stage, parts in self.accumulate.items():
            if stage not in (*TRAINED, *TUNING):
                raise ValueError(
                    f"accumulate names {stage}, which is no training: choose of {', '.join((*TRAINED, *TUNING))}"
                )
            if parts > 1 and stage not in ("mim", "reverse", *TUNING):
                raise ValueError(
                    f"accumulate.{stage} {parts}: a contrastive loss compares each image with all others of its batch, "
                    "so a batch in parts has another loss: divide it among more processes, or lower "
                    f"{stage}.batch_size; mim, reverse, {' and '.join(TUNING)} can be accumulated"
                )
        return self
