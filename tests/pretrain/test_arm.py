"""What an arm's training is built from, and when it is checked. Nothing is trained."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Silent, merged

from lgp.compute.launch import WorkerDone
from lgp.compute.randomness import Stream
from lgp.data.labels import LabelledImages
from lgp.data.loading import Batch, CropDataset
from lgp.errors import LgpError
from lgp.features.extraction import Running, extract, features_of
from lgp.models.contrastive import build_contrastive
from lgp.models.refine import Refine
from lgp.models.vit import build_encoder
from lgp.params.file import Params
from lgp.pretrain import arm
from lgp.pretrain.arm import Checks, Objective, Pretrained, Session, fit_arm
from lgp.pretrain.head_warmup import HeadsObserver, HeadWarmup
from lgp.pretrain.sanity_checks import Findings, check_features, check_loss, weights_of
from lgp.training.alarms import KNN, fallen
from lgp.training.loop import Progression
from lgp.training.optimizer import warmup_cosine
from lgp.training.resume_states import StateStore

CPU, BETAS = torch.device("cpu"), (0.8, 0.9)
BATCH, PER_EPOCH = 32, 6  # of 220 images
SECTION = {"epochs": 20, "warmup_epochs": 4, "weight_decay": 0.07, "clip_norm": 0.5, "batch_size": BATCH}


def no_loss(_: Batch) -> torch.Tensor:
    return torch.zeros(())


class Fixed:
    """A trainer that does no step. It keeps what it was given, and what learnt while it was asked to train."""

    made: list["Fixed"]

    def __init__(self, **given: Any) -> None:
        self.given, self.optimizer = given, given["optimizer"]
        self.learning: set[str] = set()
        self.made.append(self)

    def fit(self) -> Progression:
        self.learning = {name for name, p in self.given["model"].named_parameters() if p.requires_grad}
        return Progression(160, first_loss=3.0, train_flops=1000 * len(self.made), history=[{"train/loss": 2.0}] * 20)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Fixed]:
    Fixed.made = []
    monkeypatch.setattr(arm, "Trainer", Fixed)
    return Fixed.made


@pytest.fixture
def params(values: dict[str, Any]) -> Params:
    return Params.model_validate(merged(values, {"cl": SECTION, "run": {"decoded_gib": 0.5}}))


@pytest.fixture
def session(params: Params, prepared: LabelledImages, tmp_path: Path) -> Session:
    return Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent())


def objective_of(session: Session, **changes: Any) -> Objective:
    torch.manual_seed(0)
    params = session.params
    model = build_contrastive(build_encoder(params.model, params.data), params.contrastive)
    crops = CropDataset(session.data, params.contrastive.views, 2, BATCH, Stream(0, "cl"))
    return replace(Objective("cl", model, no_loss, crops), **changes)


def rates_of(objective: Objective) -> dict[str, float]:
    return {name: 0.1 if "encoder" in name else 0.3 for name, _ in objective.model.named_parameters()}


def fitted(objective: Objective, session: Session) -> Pretrained:
    return fit_arm(objective, rates_of(objective), BETAS, session.params.cl, session)


def test_trainer_gets_what_the_arm_and_its_section_say(trainers: list[Fixed], session: Session) -> None:
    objective = objective_of(session)
    fitted(objective, session)
    (trainer,) = trainers
    given, optimizer = trainer.given, trainer.optimizer
    named = ("name", "model", "loss_of", "crops", "settings", "store", "observer")
    run = session.params.run
    assert [given[key] for key in named] == [
        "cl", objective.model, no_loss, objective.crops, run, session.store, session.observer,
    ]  # fmt: skip
    assert [given[key] for key in ("epochs", "device", "precision", "clip_norm")] == [20, CPU, torch.float32, 0.5]
    names = {id(p): name for name, p in objective.model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["betas"] == BETAS
        for p in group["params"]:
            rate = rates_of(objective)[names[id(p)]]
            assert (group["initial_lr"], group["weight_decay"]) == (rate, 0.07 if p.ndim > 1 else 0)
    schedule = warmup_cosine(optimizer, 20 * PER_EPOCH, 4 * PER_EPOCH)
    assert [given["schedule"]._get_lr(step) for step in (0, 5, 24, 100, 119)] == [
        schedule._get_lr(step) for step in (0, 5, 24, 100, 119)
    ]


def test_device_precision_disk_and_memory_are_asked_for_with_what_the_arm_needs(
    trainers: list[Fixed], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, tuple[Any, ...]] = {}

    def noted(name: str, answer: Any) -> Callable[..., Any]:
        return lambda *args: (asked.update({name: args}), answer)[1]

    for name, answer in (
        ("choose_device", CPU), ("choose_precision", torch.bfloat16), ("joined", nullcontext()), ("place", None),
        ("check_disk_space", None), ("check_batch", None),
    ):  # fmt: skip
        monkeypatch.setattr(arm, name, noted(name, answer))
    monkeypatch.setattr(session.data, "keep_decoded", noted("keep_decoded", None))
    objective, run = objective_of(session), session.params.run
    result = fitted(objective, session)
    weights = sum(p.numel() for p in objective.model.parameters())
    assert asked == {
        "choose_device": (run,),
        "choose_precision": (run, CPU, 16),
        "joined": ("cl", CPU),
        "check_batch": ("cl", BATCH, len(session.data.pretraining_ids), 1, {}),
        "check_disk_space": (session.store.folder, 44 * weights),
        "place": (objective.model, CPU, torch.bfloat16),
        "keep_decoded": (2**29,),
    }
    assert trainers[0].given["precision"] == torch.bfloat16
    computed = {"device": "cpu", "precision": "torch.bfloat16", "threads": torch.get_num_threads(), "processes": 1}
    assert result.computed == computed | {"compiled": False}
    assert result.model is objective.model
    assert result.progression.train_flops == 1000


def test_batch_that_the_images_or_the_parts_do_not_allow_is_refused(trainers: list[Fixed], session: Session) -> None:
    crops = CropDataset(session.data, session.params.contrastive.views, 2, 300, Stream(0, "cl"))
    with pytest.raises(LgpError, match=r"cl\.batch_size 300 is larger than the 2\d\d images of the training part"):
        fitted(objective_of(session, crops=crops), session)
    run = session.params.run.model_copy(update={"accumulate": {"cl": 5}})
    session = replace(session, params=session.params.model_copy(update={"run": run}))
    with pytest.raises(LgpError, match=r"cl\.batch_size 32 cannot be cut into 5 equal parts"):
        fitted(objective_of(session), session)
    assert not trainers


def test_other_process_trains_its_rows_and_returns_nothing(
    trainers: list[Fixed], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm, "rank", lambda: 1)
    monkeypatch.setattr(arm, "world_size", lambda: 2)
    objective = objective_of(session)
    with pytest.raises(WorkerDone):
        fitted(objective, session)
    assert objective.crops.rows == slice(16, 32)
    assert len(trainers) == 1


@pytest.fixture
def warmed(session: Session) -> Objective:
    crops = CropDataset(session.data, session.params.contrastive.views, 2, BATCH, Stream(0, "cl/heads"))
    return objective_of(session, head_warmup=HeadWarmup(5, lambda _: torch.ones(()), crops))


def test_heads_are_trained_apart_before(trainers: list[Fixed], session: Session, warmed: Objective) -> None:
    assert warmed.head_warmup is not None
    learning = {name for name, p in warmed.model.named_parameters() if p.requires_grad}
    result = fitted(warmed, session)
    heads, whole = trainers
    given = heads.given
    named = ("name", "model", "loss_of", "crops", "epochs", "clip_norm", "settings")
    expected = ["cl-heads", warmed.model, warmed.head_warmup.loss_of, warmed.head_warmup.crops, 5, 0.5]
    assert [given[key] for key in named] == [*expected, session.params.run]
    assert given["store"].folder == session.store.folder / "heads"
    assert isinstance(given["observer"], HeadsObserver)
    assert given["observer"].observer is session.observer
    schedule = warmup_cosine(heads.optimizer, 5 * PER_EPOCH, PER_EPOCH)  # 4 of 20 epochs are one of 5
    assert given["schedule"]._get_lr(3) == schedule._get_lr(3)
    assert given["schedule"]._get_lr(25) == schedule._get_lr(25)
    assert heads.learning == {name for name in learning if not name.startswith("encoder.")}
    assert whole.learning == learning
    assert whole.given["name"] == "cl"
    assert result.progression.train_flops == 1000 + 2000
    assert not any(key.startswith("heads/") for key in result.checks.metrics)


@pytest.mark.parametrize("rank", [0, 1])
def test_heads_are_measured_with_labels_by_the_first_process(
    rank: int, trainers: list[Fixed], session: Session, warmed: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(model: Any, knn: Any, device: Any) -> dict[str, float]:
        asked.append((model, knn.labelled, knn.settings, knn.running, device))
        return {"heads/knn_encoder": 12.0}

    monkeypatch.setattr(arm, "OnlineKnn", Known)
    monkeypatch.setattr(arm, "knn_in_head", measured)
    monkeypatch.setattr(arm, "rank", lambda: rank)
    monkeypatch.setattr(arm, "world_size", lambda: 2)
    labelled = with_workers(replace(session, labelled=session.data))
    if rank:
        with pytest.raises(WorkerDone):
            fitted(warmed, labelled)
        assert not asked
        return
    checks = fitted(warmed, labelled).checks
    assert asked == [(warmed.model, session.data, session.params.run.online_knn, Running(3, CPU), CPU)]
    assert checks.metrics["heads/knn_encoder"] == 12
    assert {"features/std", "moved/block0"} <= checks.metrics.keys()


def with_workers(session: Session) -> Session:
    run = session.params.run.model_copy(update={"workers": 3})
    return replace(session, params=session.params.model_copy(update={"run": run}))


class Known:
    """Stands for the online k-NN, of three validation images."""

    val = (4, 5, 6)

    def __init__(self, labelled: Any, settings: Any, running: Any, more: Any = None) -> None:
        self.labelled, self.settings, self.running, self.more = labelled, settings, running, more

    def after_epoch(self, *about: Any) -> Any:
        return self.labelled, self.settings, self.running, self.more, *about


def test_trainer_measures_knn_after_an_epoch_where_labels_are_prepared(
    trainers: list[Fixed], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm, "OnlineKnn", Known)
    objective = objective_of(session)
    fitted(objective, session)

    def more(_: Any) -> dict[str, float]:
        return {}

    fitted(objective, with_workers(replace(session, labelled=session.data, more=more)))
    without, with_labels = trainers
    assert not hasattr(without, "after_epoch")
    after_epoch = with_labels.after_epoch(7)  # type: ignore[attr-defined]
    assert after_epoch == (
        session.data,
        session.params.run.online_knn,
        Running(3, CPU),
        more,
        7,
        objective.model.encoder,
        CPU,
    )
    history = [{KNN: 90.0}, {KNN: 20.0}]
    assert (fallen(history, 3), with_labels.alarms(history)) == ([], [])  # type: ignore[attr-defined]
    assert fallen(history)


def test_published_encoder_is_checked_and_watched(
    trainers: list[Fixed], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    refined = session.params.contrastive.model_copy(update={"objective": "refine"})
    model = build_contrastive(build_encoder(session.params.model, session.params.data), refined)
    assert isinstance(model, Refine)
    asked: list[Any] = []
    monkeypatch.setattr(arm, "OnlineKnn", Known)
    monkeypatch.setattr(arm, "features_of", lambda encoder, _: asked.append(encoder))
    monkeypatch.setattr(arm, "extract", lambda *_: np.eye(4))
    objective = replace(objective_of(session), model=model)
    fitted(objective, replace(session, labelled=session.data))
    assert asked == [model.averaged_encoder]
    assert trainers[-1].after_epoch(1)[5] is model.averaged_encoder  # type: ignore[attr-defined]


def checks_of(objective: Objective, stage: Any, accepted: bool = False) -> Checks:
    rates, model = rates_of(objective), objective.model
    optimizer = torch.optim.AdamW([{"params": [p], "lr": rates[name]} for name, p in model.named_parameters()])
    return Checks(objective, weights_of(model), rates, optimizer, stage, CPU, accepted)


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The steps and the number of images of each check. All find a fault."""
    asked: list[tuple[int, int]] = []
    found = Findings({"m": 1.0}, {"it collapsed": "train it anew", "it stood": "raise"}, ("short",))
    monkeypatch.setattr(Checks, "_after", lambda _, now, images: asked.append((now.step, images)) or found)  # type: ignore[func-returns-value]
    return asked


@pytest.mark.parametrize(
    ("epochs", "warmup", "due"),
    [
        (9, 1, []),  # no tenth of it is an epoch
        (10, 1, list(range(2, 11))),
        (25, 4, list(range(6, 26, 2))),
        (20, 4.0, list(range(6, 21, 2))),  # not at the end of the warm-up
        (1000, 10, list(range(20, 1001, 10))),
    ],
)
def test_check_is_due_every_tenth_and_after_the_warm_up(
    epochs: int, warmup: float, due: list[int], session: Session, after: list[tuple[int, int]]
) -> None:
    stage = session.params.cl.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})
    objective = objective_of(session)
    checks = checks_of(objective, stage)
    ended = {epoch: Progression(step=PER_EPOCH * epoch, history=[{}] * epoch) for epoch in range(1, epochs + 1)}
    assert [epoch for epoch, now in ended.items() if checks.find_dead(now)] == due
    assert after == [(PER_EPOCH * epoch, 256) for epoch in due]
    assert not any(checks_of(objective, stage, accepted=True).find_dead(now) for now in ended.values())


def test_training_without_a_fault_is_not_dead(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checks, "_after", lambda *_: Findings({}, {}, ("short",)))
    assert checks_of(objective_of(session), session.params.cl).find_dead(Progression(history=[{}] * 6)) is False


def test_faults_of_a_training_that_ended_early_say_when(
    session: Session, after: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = checks_of(objective_of(session), session.params.cl)
    over = checks.of_all(Progression(step=77, history=[{}] * 20))
    early = checks.of_all(Progression(step=48, history=[{}] * 6, ended_early=True))
    assert after == [(77, 1024), (48, 256)]
    assert (early.metrics, early.warnings) == (over.metrics, over.warnings) == ({"m": 1.0}, ("short",))
    assert list(over.faults) == ["it collapsed", "it stood"]
    when = "after 6 of 20 epochs"
    assert early.faults == {f"it collapsed, {when}": "train it anew", f"it stood, {when}": "raise"}
    monkeypatch.setattr(Checks, "_after", lambda *_: Findings())
    gone = checks.of_all(Progression(step=48, history=[{}] * 6, ended_early=True))
    assert gone.faults == {f"a check failed, {when}": "train it anew"}


@pytest.mark.parametrize(("images", "every"), [(1024, 1), (100, 3), (150, 2)])
def test_check_is_of_evenly_spaced_images_and_of_all_weights(
    images: int, every: int, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    of_weights = Findings({"moved/x": 0.5}, {}, ())
    monkeypatch.setattr(arm, "check_weights", lambda *about: asked.append(about) or of_weights)  # type: ignore[func-returns-value]
    objective = objective_of(session, regularized=frozenset({"encoder.cls_token"}))
    checks = checks_of(objective, session.params.cl)
    history = [{"train/loss": 3.0}, {"train/loss": 7.0}]
    found = checks._after(Progression(step=16, first_loss=2.0, history=history), images)
    model, regularized = objective.model, objective.regularized
    assert asked == [(model, checks.initial, checks.rates, 16, checks.optimizer, regularized)]
    x = extract(features_of(model.encoder, CPU), session.data, session.data.pretraining_ids[::every])
    assert isinstance(x, np.ndarray)
    assert found.metrics == {"moved/x": 0.5, **check_features(x).metrics}
    assert not found.faults  # a penalty begins at 0, so a loss that rises says nothing
    free = checks_of(replace(objective, regularized=frozenset()), session.params.cl)
    risen = free._after(Progression(step=16, first_loss=2.0, history=history), images)
    assert risen.faults == check_loss(2.0, [3.0, 7.0]).faults != {}


def test_checks_of_a_training_are_of_its_weights_at_the_start_and_know_whether_it_is_accepted(
    trainers: list[Fixed], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.params.run.model_copy(update={"accept": ["cl"]})
    accepting = replace(session, params=session.params.model_copy(update={"run": run}))
    made: list[Checks] = []
    monkeypatch.setattr(
        Checks, "of_all", lambda self, progression: made.append(self) or Findings({"n": progression.step})
    )  # type: ignore[func-returns-value]
    for given, accepted in ((session, False), (accepting, True)):
        objective = objective_of(given)
        result = fitted(objective, given)
        checks, trainer = made.pop(), trainers.pop()
        assert result.checks.metrics == {"n": 160}
        assert checks.initial.keys() == {name for name, _ in objective.model.named_parameters()}
        assert (checks.objective, checks.rates, checks.stage) == (objective, rates_of(objective), given.params.cl)
        assert (checks.optimizer, checks.device, checks.accepted) == (trainer.optimizer, CPU, accepted)
        assert trainer.is_dead == checks.find_dead  # type: ignore[attr-defined]


def test_processes_are_joined_while_it_trains(
    trainers: list[Fixed], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    within = []

    class Joined(AbstractContextManager[None]):
        def __exit__(self, *_: Any) -> None:
            within.append(len(trainers))

    monkeypatch.setattr(arm, "joined", lambda *_: Joined())
    fitted(objective_of(session), session)
    assert within == [1]
