"""The results table and what is read off it."""

import base64
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lgp.errors import LgpError
from lgp.evaluate.outcome import Outcome, Predicted, over_subsets
from lgp.evaluate.statistics import paired_gap
from lgp.report.page import table, to_html
from lgp.report.report import (
    COLUMNS,
    ArmResults,
    accuracy_per_class,
    champion,
    correct_by_subset,
    gaps,
    per_class_table,
    results_table,
    worst_mistakes,
)
from lgp.report.table import read_results, task_name, wide_rows

IMAGES, CLASSES = 40, 3


def outcome(subsets: int, labels: int, accuracy: float, val: float, seed: int) -> Outcome:
    rng = np.random.default_rng(seed)

    def one() -> Predicted:
        truth = {split: rng.integers(0, CLASSES, IMAGES) for split in ("val", "test")}
        truth["test"] = np.arange(IMAGES) % CLASSES
        shares = {"val": val, "test": accuracy}
        given = {s: np.where(rng.random(IMAGES) < shares[s], truth[s], (truth[s] + 1) % CLASSES) for s in truth}
        certain = {
            s: 0.8 * np.eye(CLASSES)[g] + 0.2 * rng.dirichlet(np.ones(CLASSES), IMAGES) for s, g in given.items()
        }
        return Predicted(certain, truth, {split: 100 + np.arange(IMAGES) for split in truth})

    return over_subsets([one().scored() for _ in range(subsets)], labels)


def arm(name: str, accuracy: float, val: float, seed: int) -> ArmResults:
    linear = outcome(1, 1000, accuracy, val, seed)
    linear = Outcome(linear.metrics | {"test/knn_top1": 88.0}, linear.predictions)
    few = {f"fewshot-{n}": outcome(3, labels, accuracy, val, seed) for n, labels in (("1pct", 10), ("10pct", 100))}
    return ArmResults(name, {"linear": linear, **few, "finetune-10pct": outcome(3, 100, accuracy, val, seed + 9)})


ARMS = [arm("mim", 0.5, 0.4, 0), arm("cl", 0.6, 1.0, 1), arm("graft", 0.9, 0.6, 2)]


def test_table_has_the_contracts_columns_and_rows() -> None:
    found = results_table(ARMS)
    assert list(found.columns) == COLUMNS
    assert found["task"].tolist()[:5] == ["knn", "linear", "fewshot-1pct", "fewshot-10pct", "finetune-10pct"]
    assert len(found) == 15
    knn, few, metrics = found.iloc[0], found.iloc[12], ARMS[2].tasks["fewshot-1pct"].metrics
    assert knn.tolist()[:6] == ["mim", "knn", 1000, 88.0, 0.0, 1]
    assert knn["top1_ci95"] == pytest.approx(196 * (0.88 * 0.12 / IMAGES) ** 0.5, abs=0.01)
    assert few.tolist()[:3] == ["graft", "fewshot-1pct", 10]
    assert few["top1_mean"] == pytest.approx(metrics["test/top1"], abs=0.01)
    assert few["top1_ci95"] == pytest.approx(metrics["test/top1_ci95"], abs=0.01)


def test_table_is_printed_a_line_per_arm(tmp_path: Path) -> None:
    found = results_table(ARMS)
    found.to_csv(tmp_path / "results.csv", index=False)
    header, rows = wide_rows(read_results(tmp_path / "results.csv"))
    assert header == [
        "arm",
        "k-NN (1000 labels)",
        "linear (1000 labels)",
        "1 % (10 labels)",
        "10 % (100 labels)",
        "fine-tuned, 10 % (100 labels)",
    ]
    few = found.iloc[12]
    assert rows[2][3] == f"{few['top1_mean']:.1f} ± {few['top1_ci95']:.1f}"


@pytest.mark.parametrize(
    ("task", "name"),
    [("fewshot-5shot", "5 a class"), ("finetune-all", "fine-tuned, all"), ("fewshot-official", "official")],
)
def test_tasks_have_names_for_people(task: str, name: str) -> None:
    assert task_name(task) == name


def test_every_two_arms_are_compared_on_the_same_images() -> None:
    found = gaps(ARMS)
    assert len(found) == 4 * 3
    assert all(gap.points >= 0 for *_, gap in found)
    task, a, b, gap = next(row for row in found if row[:3] == ("fewshot-1pct", "graft", "cl"))
    by_arm = {x.arm: x for x in ARMS}
    assert gap == paired_gap(*correct_by_subset(by_arm[a], by_arm[b], task))
    metrics = {x.arm: x.tasks[task].metrics for x in ARMS}
    assert gap.points == pytest.approx(metrics["graft"]["test/top1"] - metrics["cl"]["test/top1"], abs=1e-3)


def test_predictions_are_lined_up_by_subset_and_image() -> None:
    task, rows = "fewshot-1pct", ARMS[0].tasks["fewshot-1pct"].predictions
    shuffled = ArmResults("mim", {task: Outcome({}, rows.sample(frac=1, random_state=0))})
    right, same = correct_by_subset(shuffled, ARMS[0], task)
    assert right.shape == (3, IMAGES)
    assert np.array_equal(right, same)
    others = ArmResults("cl", {task: Outcome({}, rows.assign(id=rows["id"] + 1))})
    with pytest.raises(
        LgpError, match="of mim and cl in fewshot-1pct are of different subsets or test images: run few"
    ):
        correct_by_subset(ARMS[0], others, task)


def test_champion_is_chosen_on_validation_not_test() -> None:
    assert champion(ARMS) == "cl"


def test_shuffling_test_labels_changes_no_champion() -> None:
    shuffled = []
    for a in ARMS:
        tasks = {}
        for task, of in a.tasks.items():
            rows = of.predictions.assign(label=of.predictions["label"].sample(frac=1, random_state=1).to_numpy())
            metrics = of.metrics | {name: 0.0 for name in of.metrics if name.startswith("test/")}
            tasks[task] = Outcome(metrics, rows)
        shuffled.append(ArmResults(a.arm, tasks))
    assert champion(shuffled) == champion(ARMS)


def test_accuracy_per_class_and_a_class_that_test_lacks() -> None:
    rows = pd.DataFrame({"label": [0, 0, 2, 2], "prediction": [0, 1, 2, 2]})
    assert np.array_equal(accuracy_per_class(rows, 4), [50, np.nan, 100, np.nan], equal_nan=True)


def test_table_of_classes_has_every_arm_and_task() -> None:
    table_of = per_class_table(ARMS, ["a", "b", "c"])
    assert len(table_of) == 3 * 4 * 3
    rows = ARMS[2].tasks["linear"].predictions
    of_b = 100 * (rows["prediction"] == 1)[rows["label"] == 1].mean()
    found = table_of.query("arm == 'graft' and task == 'linear' and `class` == 'b'")["top1"]
    assert found.tolist() == [pytest.approx(of_b, abs=0.01)]


def test_worst_mistakes_are_wrong_and_confident() -> None:
    rows = ARMS[0].tasks["linear"].predictions
    worst = worst_mistakes(rows)
    assert (worst["label"] != worst["prediction"]).all()
    assert worst["confidence"].is_monotonic_decreasing
    assert worst["confidence"].iloc[0] == rows.loc[rows["label"] != rows["prediction"], "confidence"].max()


def test_html_is_whole_without_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    picture = b"\x89PNG some picture"
    (tmp_path / "figures" / "a.png").write_bytes(picture)
    rows = "\n".join(table(["arm", "top-1"], [["<graft>", "1 & 2"]]))
    page = to_html(f"# Title\n\n{rows}\n\n![a](figures/a.png)\n", "T", tmp_path)
    assert "<h1>Title</h1>" in page
    assert "<td>&lt;graft&gt;</td>" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources] == [picture]


def test_absent_results_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match="run `dvc repro`"):
        read_results(tmp_path / "results.csv")
