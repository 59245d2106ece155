"""What unlabelled and chosen images add: which outcomes are compared, and what is said."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from test_verdict import Data

from lgp.evaluate.outcome import Outcome, Predicted, over_subsets
from lgp.evaluate.statistics import holm, paired_gap
from lgp.report.figures import plot_label_efficiency
from lgp.report.gains import METHODS, answer, gains, tasks_of
from lgp.report.outcomes import ArmOutcomes
from lgp.report.page import _added
from lgp.report.table import plain_and_added, results_table, task_name, wide_rows
from lgp.report.verdict import judge

IMAGES, SUBSETS = 200, 5
RIGHT = {
    "linear": 190,
    "fewshot-1pct": 100,
    "propagate-1pct": 180,
    "selected-1pct": 104,
    "selected-1pct-propagated": 60,
    "fewshot-10pct": 150,
    "propagate-10pct": 150,
    "finetune-10pct": 140,
    "semi-10pct": 170,
}


def arm(name: str, shift: int, val: float) -> ArmOutcomes:
    """An arm that gets `RIGHT` - `shift` of the test images right, other ones in each subset."""
    tasks = {}
    for task, right in RIGHT.items():
        rng = np.random.default_rng(right + shift)
        scored = []
        for _ in range(1 if task == "linear" else SUBSETS):
            correct = rng.permutation(IMAGES) < right - shift
            on_val = np.arange(100) < 100 * val
            probabilities = {s: np.eye(2)[(~of).astype(int)] for s, of in (("test", correct), ("val", on_val))}
            zeros = {"test": np.zeros(IMAGES, dtype=int), "val": np.zeros(100, dtype=int)}
            ids = {"test": np.arange(IMAGES), "val": np.arange(100)}
            scored.append(Predicted(probabilities, zeros, ids).scored())
        labels = {"linear": 1000}.get(task, 10 if "1pct" in task else 100)
        found = over_subsets(scored, labels)
        knn = {f"test/knn_top1{end}": 50.0 for end in ("", "_low", "_high")} if task == "linear" else {}
        tasks[task] = Outcome(found.metrics | knn | {"knn_k": 20.0}, found.predictions)
    return ArmOutcomes(name, tasks)


ARMS = [arm("mim", 20, 0.6), arm("graft", 0, 0.9)]


def test_each_method_is_compared_with_its_base_of_the_same_arm_and_labels() -> None:
    found = gains(ARMS)
    measured = {"fewshot-1pct": list(METHODS), "fewshot-10pct": ["propagated"], "finetune-10pct": ["semi-supervised"]}
    assert [(g.arm, g.base, g.method) for g in found] == [
        (a.arm, base, method) for a in ARMS for base, methods in measured.items() for method in methods
    ]
    for gain in found:
        of = next(a for a in ARMS if a.arm == gain.arm).tasks
        assert gain.task == tasks_of(gain.base)[gain.method]
        tables = [of[t].predictions.sort_values(["subset", "id"]) for t in (gain.task, gain.base)]
        right = [(t["prediction"] == t["label"]).to_numpy().reshape(SUBSETS, -1) for t in tables]
        assert gain.gap == paired_gap(right[0], right[1])
    for row in ([0, 1, 2], [3], [4], [5, 6, 7], [8], [9]):
        assert [found[i].p for i in row] == holm([found[i].gap.p for i in row])


def test_answer_says_how_good_the_leader_is_and_what_each_method_changes() -> None:
    found = gains(ARMS)
    said = answer(ARMS, found)
    few = ARMS[1].tasks["fewshot-1pct"].metrics
    assert said.startswith(
        f"With 10 labels, graft gets 50.0 % of the test images right [{few['test/top1_low']:.1f}, "
        f"{few['test/top1_high']:.1f}]; with all 1,000 labels, 95.0 %. Spreading these labels to the unlabelled "
        "training images changes this by +40.0 ["
    )
    assert "Choosing which images to label changes this by +2.0 [" in said
    assert "Both together change this by -20.0 [" in said
    parts = said.split(". ")
    assert [part.rstrip(".").endswith("undecided") for part in parts[-3:]] == [False, True, False]
    assert answer([ArmOutcomes("mim", ARMS[0].tasks, trained=False)], []) == ""


def test_answer_is_the_first_line_unless_nobody_is_crowned() -> None:
    crowned = judge(ARMS, Data(), "another")  # type: ignore[arg-type]
    assert crowned.lines[:2] == [crowned.answer, crowned.sentence]
    baseline = arm("pixels", -20, 0.9)
    uncrowned = judge([baseline, *ARMS], Data(), "another")  # type: ignore[arg-type]
    assert uncrowned.champion is None
    assert uncrowned.lines[:2] == [uncrowned.sentence, uncrowned.answer]


def test_what_choosing_adds_is_not_compared_between_arms() -> None:
    tasks = {pair.task for pair in judge(ARMS, Data(), "another").pairs}  # type: ignore[arg-type]
    frozen = {"linear", "fewshot-1pct", "fewshot-10pct", "propagate-1pct", "propagate-10pct"}
    assert tasks == {*frozen, "finetune-10pct", "semi-10pct"}


def test_tables_keep_the_methods_apart() -> None:
    rows = [{k: str(v) for k, v in row.items()} for row in results_table(ARMS).to_dict("records")]
    plain, added = plain_and_added(rows)
    header, _ = wide_rows(plain)
    frozen = ["arm", "k-NN (1000 labels)", "linear (1000 labels)", "1 % (10 labels)", "10 % (100 labels)"]
    assert header == [*frozen, "fine-tuned, 10 % (100 labels)", "semi-supervised, 10 % (100 labels)"]
    header, cells = wide_rows(added)
    assert header[1:] == [
        "1 %, propagated (10 labels)",
        "1 %, selected (10 labels)",
        "1 %, selected and propagated (10 labels)",
        "10 %, propagated (100 labels)",
    ]
    assert cells[1][1].startswith("90.0 [")
    assert task_name("selected-5shot-propagated") == "5 a class, selected and propagated"


def test_picture_has_a_plot_for_each_method(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    drawn: list[tuple[str, list[float]]] = []

    def noted(axes: Axes, x: object, y: object, *_: object, label: str, **__: object) -> None:
        drawn.append((label, list(y)))  # type: ignore[call-overload]

    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", noted)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda _: None)
    plot_label_efficiency(tmp_path / "picture.png", results_table(ARMS), 2)  # type: ignore[operator]
    assert drawn[1] == ("graft", [50.0, 75.0, 95.0])
    assert [values for name, values in drawn if name == "graft"][1:] == [[90.0, 75.0], [52.0], [30.0], [70.0], [85.0]]


def test_page_has_a_row_for_what_semi_supervised_fine_tuning_adds() -> None:
    lines = _added(gains(ARMS))
    assert "| arm | labels | propagated | selected | selected and propagated | semi-supervised |" in lines
    (row,) = (line for line in lines if line.startswith("| graft | fine-tuned, 10 % |"))
    assert row.split(" | ")[2:5] == ["–", "–", "–"]
    assert "+15.0 [" in row.split(" | ")[5]
    without = [ArmOutcomes("graft", {t: o for t, o in ARMS[1].tasks.items() if not t.startswith("semi")})]
    assert not [line for line in _added(gains(without)) if "emi-supervised" in line]
