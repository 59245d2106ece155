"""Section `run`: how a stage runs, not what it computes."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lgp.params.arms import TRAINED, TUNING
from lgp.params.section import ArmName, Count, NonNegative, Positive, Section, Whole


class OnlineKnnParams(Section):
    """k-NN during pre-training: every `every_epochs` epochs (0: never), on some labelled images and some of val.

    `ridge` adds ridge regression with the fewest labels of `few_labels`.
    """

    every_epochs: Annotated[Whole, Field(ge=0)] = 10
    train_images: Count = 256
    val_images: Count = 256
    ridge: bool = True


class RunParams(Section):
    """How a stage runs, not what it computes. No stage of dvc.yaml lists this section."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = None
    workers: Annotated[Whole, Field(ge=0)] = 0
    decoded_gib: NonNegative = 2.0
    processes: Count = 1
    lost_after_s: Annotated[float, Field(ge=5)] = 60.0  # a sign of life comes every second
    accumulate: dict[str, Count] = Field(default_factory=dict)
    grad_checkpointing: list[str] = Field(default_factory=list)
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
    def _names_trainings_only(self) -> Self:
        trainings = (*TRAINED, *TUNING)
        for key, stages in (("accumulate", self.accumulate), ("grad_checkpointing", self.grad_checkpointing)):
            for stage in stages:
                if stage not in trainings:
                    raise ValueError(f"{key} names {stage}, which is no training: choose of {', '.join(trainings)}")
        return self
