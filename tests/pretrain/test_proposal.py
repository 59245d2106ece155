"""Sizes suit the images, epochs fit into the time, and the preset's ratio of the arms stays."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, merged

from lgp.data.inspection import Inspection, Sample, Spread
from lgp.params.editing import with_values
from lgp.params.file import Params, load_params
from lgp.pretrain.expected_time import expected_minutes, fine_tuning_minutes, labels_of
from lgp.pretrain.proposal import ARMS, Proposal, kept_values, preset_for, propose, training_minutes
from lgp.pretrain.speed import images_per_second
from lgp.workflow.presets import FOLDER, adopt

SPEEDS = {"mim": 400.0, "cl": 100.0, "graft": 100.0}


@pytest.fixture(scope="module")
def cifar() -> Params:
    return load_params(FOLDER / "cifar10-cpu.yaml")


def source_of(images: int = 5000, side: int = 32, channels: int = 3, classes: int = 10) -> Inspection:
    """A source of so many labelled training images, evenly in classes, and a tenth as many of val and test."""
    grey = [0.5] * channels
    sample = Sample(
        images=10, formats={}, modes={"RGB": 10}, transparent=0, short_side=Spread(side, side, side),
        aspect=Spread(1, 1, 1), channels=channels, grey_in_colour=0, mean=grey, std=grey, copies=[], contradictions=[],
        unreadable=[], seconds=0.01,
    )  # fmt: skip
    labels = {f"c{i}": images // classes for i in range(classes)}
    parts = {"train": images, "val": images // 10, "test": images // 10}
    return Inspection({"train": images, "val": 0, "test": 0}, labels, 0, 0, 0, parts, labels, [], [], [], [], sample)


def proposed(params: Params, inspection: Inspection, minutes: float = 30, cuda: bool = False) -> Proposal:
    return propose(inspection, minutes, params, cuda, lambda _, arm: SPEEDS[arm])


def test_epochs_take_the_given_time(cifar: Params) -> None:
    source = source_of()
    for minutes in (20, 30, 60):
        found = proposed(cifar, source, minutes)
        assert sum(found.minutes.values()) == pytest.approx(minutes, rel=0.1)
        assert found.notes == []


def test_ratio_of_the_preset_stays(cifar: Params) -> None:
    epochs = {arm: proposed(cifar, source_of(), 60).values[f"{arm}.epochs"] for arm in ARMS}
    assert epochs["mim"] / epochs["cl"] == pytest.approx(cifar.mim.epochs / cifar.cl.epochs, rel=0.05)
    assert epochs["graft"] / epochs["cl"] == pytest.approx(cifar.graft.epochs / cifar.cl.epochs, rel=0.05)


def test_minutes_are_of_whole_batches(cifar: Params) -> None:
    assert training_minutes(cifar, "cl", SPEEDS, 5000) == pytest.approx(cifar.cl.epochs * 39 * 128 / 100 / 60)


def test_epochs_stay_within_bounds_and_say_so(cifar: Params) -> None:
    many, few = proposed(cifar, source_of(10**6)), proposed(cifar, source_of(300, classes=2), 600)
    assert [many.values[f"{arm}.epochs"] for arm in ARMS] == [12, 8, 5]
    assert any("set data.max_train_images to" in note for note in many.notes)
    assert [few.values[f"{arm}.epochs"] for arm in ARMS] == [10 * getattr(cifar, arm).epochs for arm in ARMS]
    assert "10 times the preset's" in few.notes[-1]


def test_warm_up_is_a_tenth(cifar: Params) -> None:
    values = proposed(cifar, source_of()).values
    assert all(values[f"{a}.warmup_epochs"] == max(round(values[f"{a}.epochs"] / 10), 1) for a in ARMS)


def test_sizes_are_those_of_the_images(cifar: Params) -> None:
    values = proposed(cifar, source_of(200, side=500, channels=1)).values
    wanted = {"data.image_size": 64, "data.channels": 1, "model.patch_size": 16, "cl.batch_size": 32}
    assert wanted.items() <= values.items()
    assert values["data.max_train_images"] is values["data.max_test_images"] is None
    large = proposed(cifar, source_of(side=500), cuda=True).values
    assert (large["data.image_size"], large["contrastive.views.crop_scale_min"]) == (224, 0.08)


def test_speed_is_measured_with_the_proposed_sizes(cifar: Params) -> None:
    measured = []

    def speed(params: Params, arm: str) -> float:
        measured.append((arm, params.data.image_size, getattr(params, arm).batch_size))
        return 100.0

    propose(source_of(200, side=48), 5, cifar, False, speed)
    assert measured == [(arm, 48, 32) for arm in ARMS]


def test_few_labels_and_their_fine_tuning_are_proposed(cifar: Params) -> None:
    plenty = proposed(cifar, source_of()).params
    assert (plenty.few_labels, plenty.finetuned) == (["1pct", "10pct"], ["1pct", "10pct"])
    scarce = proposed(cifar, source_of(140)).params
    assert scarce.few_labels == ["1shot", "5shot", "all"]
    assert (scarce.labels.shots, scarce.finetuned) == ([1, 5], ["5shot"])
    assert scarce.propagated[-1:] == ["all"]
    assert scarce.finetune["5shot"] == cifar.finetune["10pct"]


def test_fine_tuning_that_takes_longer_is_left_out(cifar: Params) -> None:
    source = source_of(200_000)
    found = proposed(cifar, source, 60)
    assert fine_tuning_minutes(cifar, source, "10pct", 100) > 60
    assert found.params.finetuned == ["1pct"]
    assert sum("fine-tuning with 10pct would take about" in note for note in found.notes) == 1
    assert proposed(cifar, source, 30).params.finetuned == []


@pytest.mark.parametrize(("side", "preset"), [(8, "digits"), (12, "digits"), (13, "cifar10-cpu"), (500, "cifar10-cpu")])
def test_preset_follows_the_size(side: int, preset: str) -> None:
    assert preset_for(source_of(side=side)) == preset


def test_every_proposal_can_be_written(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("old")
    for number, (side, images) in enumerate([(8, 50), (32, 140), (400, 10**5)]):
        source = source_of(images, side)
        preset = preset_for(source)
        found = proposed(load_params(FOLDER / f"{preset}.yaml"), source)
        before = adopt(preset, file, found.values)
        assert load_params(file) == found.params
        assert before.name == f"params.yaml.before{number + 1 if number else ''}"
        assert "# paper: 1600" in file.read_text()
    assert (tmp_path / "params.yaml.before").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == "params.yaml.before3"


def test_own_source_and_way_to_compute_stay(values: dict[str, Any], cifar: Params) -> None:
    own = {
        "data": {"source": [{"folder": "photos"}, "a.csv"], "columns": {"label": "kind"}, "test_share": 0.3}
        | {"labels": ["labels.csv"]},
        "run": {"device": "cpu", "threads": 2, "accept": ["mim"]},
    }
    kept = kept_values(Params.model_validate(merged(values, own)), cifar)
    after = with_values(cifar, kept)
    assert after.data.model_dump(exclude={"max_train_images"}) == Params.model_validate(
        merged(yaml.safe_load((ROOT / "presets" / "cifar10-cpu.yaml").read_text()), own)
    ).data.model_dump(exclude={"max_train_images"})
    assert (after.data.labels, after.run.threads, after.run.accept) == (("labels.csv",), 2, ["mim"])
    assert "run.workers" not in kept


def test_labels_of_a_name_are_counted_as_they_are_drawn(cifar: Params) -> None:
    assert [labels_of(cifar, source_of(), name) for name in ("1pct", "10pct", "all")] == [50, 500, 5000]
    assert labels_of(proposed(cifar, source_of(140)).params, source_of(140), "5shot") == 50


def test_whole_time_is_the_sum_of_said_parts(cifar: Params) -> None:
    source = source_of()
    training = {"mim": 10.0, "cl": 12.0, "graft": 5.0}
    parts = expected_minutes(cifar, source, SPEEDS, training, start_s=6)
    assert parts["pre-training"] == 27
    assert parts["prepare"] == pytest.approx(5000 * 0.01 / 60)
    # three arms, five subsets, 30 epochs of 50 and of 500 images
    assert parts["fine-tuning"] == pytest.approx(3 * 5 * 30 * 550 * 3 / 8 / 100 / 60)
    # prepare, labels, report, an arm each; 5 linear, 10 few-label, 10 propagated, 10 selected, 6 fine-tuned
    assert parts["start of commands"] == pytest.approx((3 + 5 + 41) * 0.1)
    assert 0 < parts["evaluation"] < 27


def test_without_labels_nothing_is_evaluated(cifar: Params) -> None:
    source = source_of()
    object.__setattr__(source, "train_labels", {})
    found = proposed(cifar, source)
    parts = expected_minutes(found.params, source, SPEEDS, found.minutes, start_s=6)
    assert (parts["evaluation"], parts["fine-tuning"]) == (0, 0)


@pytest.mark.parametrize("arm", ARMS)
def test_real_steps_are_measured(arm: str, params: Params) -> None:
    assert images_per_second(params, arm, seconds=0) > 0
