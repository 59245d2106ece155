"""Who is crowned, and what a reader is told before the numbers."""

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from lgp.data.labels import LabelledImages
from lgp.evaluate.outcome import Outcome, Predicted, over_subsets
from lgp.report.outcomes import ArmOutcomes
from lgp.report.verdict import Verdict, judge, repeated

TASKS = {"linear": 1, "fewshot-1pct": 5, "fewshot-10pct": 5}  # with their number of subsets
LABELS = {"linear": 1000, "fewshot-1pct": 10, "fewshot-10pct": 100}


class Data:
    """Prepared images with a validation part of a given size, whose subsets have the given images."""

    def __init__(self, val: int = 500, subsets: Mapping[str, list[int]] | None = None) -> None:
        self.val, self.of_name = val, subsets or {"1pct": [1], "10pct": [1, 2]}

    def ids(self, part: str) -> range:
        assert part == "val"
        return range(self.val)

    def names_of_same_subsets(self, name: str) -> list[str]:
        return [other for other, ids in self.of_name.items() if ids == self.of_name[name]]


def arm(name: str, right: Mapping[str, int], val: float = 0.5, knn: float = 50.0, trained: bool = True) -> ArmOutcomes:
    """An arm that gets the first `right[task]` of 100 test images right in every subset."""
    tasks = {}
    for task, subsets in TASKS.items():
        correct = np.arange(100) < right.get(task, 50)
        one = Predicted(
            {"test": np.eye(2)[(~correct).astype(int)], "val": np.eye(2)[(np.arange(100) >= 100 * val).astype(int)]},
            {"test": np.zeros(100, dtype=int), "val": np.zeros(100, dtype=int)},
            {"test": np.arange(100), "val": np.arange(100)},
        ).scored()
        outcome = over_subsets([one] * subsets, LABELS[task])
        tasks[task] = Outcome(
            outcome.metrics | {"test/knn_top1": knn, "test/knn_top1_low": knn - 1, "test/knn_top1_high": knn + 0.5},
            outcome.predictions,
        )
    return ArmOutcomes(name, tasks, trained)


def judged(*arms: ArmOutcomes, data: Data | None = None, start: str = "another") -> Verdict:
    return judge(list(arms), data or Data(), start)  # type: ignore[arg-type]


WEAK = {"linear": 20, "fewshot-1pct": 20, "fewshot-10pct": 20}


def test_leader_that_beats_every_baseline_is_crowned() -> None:
    found = judged(arm("pixels", WEAK, knn=9), arm("random", WEAK, knn=9), arm("cl", {}), arm("graft", {}, val=0.9))
    assert (found.champion, found.notes) == ("graft", [])
    assert found.sentence == (
        "graft is the champion: it has the best validation accuracy with the fewest labels (1 %); on test it is ahead "
        "of pixels and random there, and no interval holds a tie."
    )


def test_crown_has_metric_interval_and_the_runner_up_on_val() -> None:
    others = arm("cl", {"fewshot-1pct": 40}, val=0.8), arm("mim", {"fewshot-1pct": 45}, val=0.6)
    found = judged(arm("pixels", WEAK, val=0.85), *others, arm("graft", {"fewshot-1pct": 70}, val=0.9))
    measured = r"[\d.]+ \[[\d.]+, [\d.]+\]"
    assert re.fullmatch(
        rf"test/top1 of fewshot-1pct: {measured}; runner-up cl: {measured}; graft beats cl by 30.0 points "
        r"\[\+[\d.]+, \+[\d.]+\]",
        found.crown,
    )
    assert found.crown.startswith("test/top1 of fewshot-1pct: 70.0 [")
    assert "runner-up cl: 40.0 [" in found.crown
    alone = judged(arm("pixels", WEAK), arm("graft", {"fewshot-1pct": 70}))
    assert alone.crown.endswith("]; no other trained arm")
    assert judged(arm("pixels", {"fewshot-1pct": 90}), arm("graft", {})).crown == ""


def test_what_grafting_changes_is_said_with_the_sign_of_the_graft() -> None:
    public = arm("public", {"linear": 50, "fewshot-1pct": 40, "fewshot-10pct": 70}, val=0.8)
    graft = arm("graft", {"linear": 52, "fewshot-1pct": 70, "fewshot-10pct": 50}, val=0.9)
    found = judged(arm("pixels", WEAK, knn=9), public, graft, start="public")
    told = r"([\w %]+ \([\d,]+ labels\)) ([+-][\d.]+) \[([+-])[\d.]+, ([+-])[\d.]+\](.*?)[;.]"
    first, second, third = re.findall(told, found.helped.partition(": ")[2].replace("; ", ";"))
    assert (first, second) == (("1 % (10 labels)", "+30.0", "+", "+", ""), ("10 % (100 labels)", "-20.0", "-", "-", ""))
    assert third == ("linear (1,000 labels)", "+2.0", "-", "+", ", undecided")
    assert found.helped.startswith(
        "Grafting on public changes the accuracy of frozen features, in points: 1 % (10 labels) +30.0 ["
    )
    assert found.lines[:3] == [found.answer, found.sentence, found.helped]


@pytest.mark.parametrize("start", ["public", "cl"])
def test_nothing_is_said_of_grafting_without_the_graft_or_its_start(start: str) -> None:
    arms = {name: arm(name, {}) for name in ("pixels", "cl", "graft")}
    assert judged(*arms.values(), start="public").helped == ""
    assert judged(arms["pixels"], arms["cl"], start=start).helped == ""
    assert "Grafting on cl changes" in judged(*arms.values(), start="cl").helped
    for name in ("cl", "graft"):
        assert judged(*(arms | {name: replace(arms[name], trained=False)}).values(), start="cl").helped == ""


@pytest.mark.parametrize(("more", "decided"), [(5, False), (6, True)])
def test_what_grafting_changes_is_decided_after_the_correction_for_its_tasks(more: int, decided: bool) -> None:
    arms = arm("mim", {}), arm("graft", {"fewshot-1pct": 50 + more}, val=0.9)
    p = next(pair.gap.p for pair in judged(*arms).pairs if pair.task == "fewshot-1pct")
    assert p < 0.05
    assert (p < 0.05 / len(TASKS)) is decided
    assert judged(*arms, start="mim").helped.split(";")[0].endswith("undecided") is not decided


def test_tasks_of_grafting_come_by_their_labels_and_repeats_are_left_out() -> None:
    first = arm("mim", {}).tasks
    tasks = {"linear": first["linear"], "fewshot-10pct": first["fewshot-10pct"], "fewshot-1pct": first["fewshot-1pct"]}
    arms = [ArmOutcomes(name, tasks) for name in ("mim", "graft")]
    said = judged(*arms, start="mim").helped
    assert re.findall(r"(\w+(?: %)?) \(", said) == ["1 %", "10 %", "linear"]
    same, arms = Data(subsets={"1pct": [1], "10pct": [1]}), [arm(name, {}) for name in ("mim", "graft")]
    assert re.findall(r"(\w+(?: %)?) \(", judged(*arms, start="mim", data=same).helped) == ["1 %", "linear"]


def test_baseline_ahead_of_every_arm_is_said() -> None:
    found = judged(arm("random", {**WEAK, "fewshot-1pct": 53}), arm("cl", {}), arm("graft", WEAK, val=0.9))
    assert found.champion is None
    assert found.sentence == (
        "Nobody is crowned. With the fewest labels (1 %), random (53.0 %) is ahead of every trained arm; random and cl "
        "are undecided: random is ahead by 3.0 points [-0.9, +8.5]."
    )


def test_leader_undecided_against_a_baseline_is_not_crowned() -> None:
    found = judged(arm("pixels", {**WEAK, "fewshot-1pct": 48}), arm("graft", {}))
    assert found.champion is None
    assert found.sentence.startswith(
        "Nobody is crowned. With the fewest labels (1 %), graft and pixels are undecided: graft is ahead by 2.0 points "
        "[-"
    )


def test_leader_behind_a_baseline_that_another_arm_beats_is_not_crowned() -> None:
    found = judged(arm("pixels", WEAK), arm("cl", {}), arm("graft", {**WEAK, "fewshot-1pct": 5}, val=0.9))
    assert found.champion is None
    assert "pixels beats graft by 15.0 points [" in found.sentence


def test_crown_needs_no_correction_for_the_other_rows_of_the_table() -> None:
    found = judged(arm("pixels", {**WEAK, "linear": 50, "fewshot-10pct": 50, "fewshot-1pct": 45}), arm("graft", {}))
    (pair,) = (p for p in found.pairs if p.task == "fewshot-1pct")
    assert pair.gap.p < 0.05 < pair.p
    assert not pair.beats
    assert found.champion == "graft"


def test_other_tasks_in_which_a_baseline_is_not_beaten_are_noted() -> None:
    strong = {"linear": 60, "fewshot-1pct": 20, "fewshot-10pct": 49}
    found = judged(arm("pixels", strong, knn=98.6), arm("graft", {}, knn=96.9))
    assert found.champion == "graft"
    assert found.notes[0] == (
        "k-NN: pixels, 98.6 [97.6, 99.1] %, is ahead of the best trained arm, graft, 96.9 [95.9, 97.4] %."
    )
    assert found.notes[1] == (
        "linear: pixels (60.0 %) is ahead of every trained arm; pixels beats graft by 10.0 points [+5.5, +17.4]."
    )
    assert found.notes[2].startswith("10 %: graft and pixels are undecided: graft is ahead by 1.0 points [-")
    assert len(found.notes) == 3
    assert found.unbeaten == ["k-NN", "linear", "10 %"]
    assert found.lines[0] == f"{found.answer} A baseline is not beaten in: k-NN, linear, 10 %."


def test_first_line_names_no_task_where_every_baseline_is_beaten() -> None:
    found = judged(arm("pixels", WEAK, knn=9), arm("graft", {}))
    assert (found.unbeaten, found.lines[0]) == ([], found.answer)


@pytest.mark.parametrize(("knn", "undecided"), [(98.3, True), (96.9, True), (96.7, False), (99.7, True), (99.9, False)])
def test_arms_whose_intervals_by_k_nn_meet_are_undecided(knn: float, undecided: bool) -> None:
    """k-NN is not paired. That of pixels is [97.3, 98.8]."""
    found = judged(arm("pixels", WEAK, knn=98.3), arm("cl", {}, knn=90.0), arm("graft", {}, val=0.9, knn=knn))
    said = [note for note in found.notes if note.startswith("k-NN: ")]
    if undecided:
        interval = f"{knn:.1f} [{knn - 1:.1f}, {knn + 0.5:.1f}]"
        assert said == [
            f"k-NN: pixels, 98.3 [97.3, 98.8] %, and graft, {interval} %, are undecided: their intervals meet."
        ]
    else:
        assert ["is ahead of the best trained arm, graft" in note for note in said] == [True] * (knn < 97)
    assert found.unbeaten == ["k-NN"] * bool(said)


def test_without_baselines_the_champion_is_crowned_and_the_lack_is_said() -> None:
    found = judged(arm("cl", {}, val=0.9), arm("graft", {}))
    assert found.champion == "cl"
    assert found.sentence.endswith("No baseline is among the arms, so nothing shows what the training is worth.")


def test_arm_whose_checks_failed_is_marked_and_not_crowned() -> None:
    found = judged(arm("pixels", WEAK, knn=9), arm("cl", {}), arm("graft", {}, val=0.9, trained=False))
    assert found.champion == "cl"
    assert found.notes == ["graft is not trained: its checks failed. It is never the champion."]


@pytest.mark.parametrize("known", [True, False])
def test_repeated_subsets_are_told_and_compared_once(known: bool) -> None:
    same = Data(subsets={"1pct": [1, 2], "10pct": [1, 2] if known else [1, 3]})
    found = judged(arm("pixels", WEAK, knn=9), arm("graft", {}), data=same)
    assert ("10 % has the same images as 1 %." in found.notes) == known
    assert [p.task for p in found.pairs] == ["linear", "fewshot-1pct", *([] if known else ["fewshot-10pct"])]


def test_small_validation_part_crowns_nobody() -> None:
    found = judged(arm("pixels", WEAK, knn=9), arm("graft", {}), data=Data(val=9))
    assert (found.champion, found.crown, found.notes) == (None, "", [])
    assert found.sentence.startswith(
        "Nobody is crowned: val has 9 images, so an accuracy of 50 % on it has the 95 % int"
    )
    assert found.sentence.endswith("raise data.val_share. `lgp promote ARM` crowns an arm by hand.")


def test_small_validation_part_is_a_warning_where_a_baseline_is_not_beaten() -> None:
    found = judged(arm("pixels", {}), arm("graft", {}), data=Data(val=9))
    assert "undecided" in found.sentence
    assert found.notes[-1].startswith("Warning: val has 9 images")


def test_all_labels_repeat_no_others(prepared: LabelledImages) -> None:
    given = arm("graft", {})
    of_all = replace(given, tasks=given.tasks | {"fewshot-all": given.tasks["fewshot-1pct"]})
    assert repeated([of_all], prepared) == {}


def test_verdict_reads_real_subsets(prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgp.report.verdict.small_validation", lambda images: "")
    assert judge([arm("pixels", WEAK, knn=9), arm("graft", {})], prepared, "mim").champion == "graft"
