"""The results table and what is read off it."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.evaluate.outcome import Outcome, Predicted, over_subsets
from lgp.evaluate.statistics import paired_gap
from lgp.params.file import Params
from lgp.report.outcomes import (
    ArmOutcomes,
    Inputs,
    accuracy_by_depth,
    accuracy_per_class,
    champion,
    correct_by_subset,
    fewest_labels,
    worst_mistakes,
)
from lgp.report.page import gaps, to_html
from lgp.report.report import Outputs, write_report
from lgp.report.table import COLUMNS, per_class_table, read_results, results_table, task_name, wide_rows

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


def arm(name: str, accuracy: float, val: float, seed: int) -> ArmOutcomes:
    linear = outcome(1, 1000, accuracy, val, seed)
    linear = Outcome(linear.metrics | {"test/knn_top1": 88.0}, linear.predictions)
    few = {f"fewshot-{n}": outcome(3, labels, accuracy, val, seed) for n, labels in (("1pct", 10), ("10pct", 100))}
    return ArmOutcomes(name, {"linear": linear, **few, "finetune-10pct": outcome(3, 100, accuracy, val, seed + 9)})


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
    by_arm = {x.arm: x for x in ARMS}
    found = gaps(ARMS)
    assert len(found) == 4 * 3
    for task, a, b, gap in found:
        ahead, behind = (by_arm[x].tasks[task].metrics["test/top1"] for x in (a, b))
        assert ahead > behind
        assert gap == paired_gap(*correct_by_subset(by_arm[a], by_arm[b], task))
        assert gap.points == pytest.approx(ahead - behind, abs=1e-3)
    # who is ahead does not depend on the order of the arms
    assert {row[:3] for row in gaps(ARMS[::-1])} == {row[:3] for row in found}


def test_predictions_are_lined_up_by_subset_and_image() -> None:
    task, rows = "fewshot-1pct", ARMS[0].tasks["fewshot-1pct"].predictions
    shuffled = ArmOutcomes("mim", {task: Outcome({}, rows.sample(frac=1, random_state=0))})
    right, same = correct_by_subset(shuffled, ARMS[0], task)
    assert right.shape == (3, IMAGES)
    assert np.array_equal(right, same)
    others = ArmOutcomes("cl", {task: Outcome({}, rows.assign(id=rows["id"] + 1))})
    with pytest.raises(
        LgpError, match="of mim and cl in fewshot-1pct are of different subsets or test images: run few"
    ):
        correct_by_subset(ARMS[0], others, task)


def test_champion_is_chosen_on_validation_not_test() -> None:
    assert champion(ARMS) is ARMS[1]


def test_baseline_is_never_the_champion() -> None:
    baselines = [arm(name, 0.9, 1.0, 3) for name in ("pixels", "random")]
    assert [a.is_baseline for a in (*baselines, *ARMS)] == [True, True, False, False, False]
    assert champion([*baselines, ARMS[0], ARMS[2]]).arm == "graft"
    assert champion([ARMS[0], arm("other", 0.1, 1.0, 3)]).arm == "other"  # an imported one may be


def test_fewest_labels_are_those_of_a_task_on_frozen_features() -> None:
    tasks = ARMS[0].tasks | {"finetune-1shot": outcome(3, 5, 0.5, 0.5, 0), "fewshot-1shot": outcome(3, 5, 0.5, 0.5, 0)}
    assert fewest_labels(ARMS) == "fewshot-1pct"
    assert fewest_labels([ArmOutcomes("mim", tasks)]) == "fewshot-1shot"


def test_outcomes_are_read_by_arm_and_task(tmp_path: Path) -> None:
    metrics, predictions, folders = {}, {}, {}
    for a in ARMS:
        folders[a.arm] = tmp_path / a.arm
        for task, of in a.tasks.items():
            metrics[a.arm, task] = tmp_path / f"{a.arm}-{task}.json"
            predictions[a.arm, task] = tmp_path / f"{a.arm}-{task}.parquet"
            metrics[a.arm, task].write_text(json.dumps(of.metrics))
            of.predictions.to_parquet(predictions[a.arm, task])
    found = Inputs(metrics, predictions, folders).read()
    assert [a.arm for a in found] == ["mim", "cl", "graft"]
    for read, written in zip(found, ARMS, strict=True):
        assert list(read.tasks) == list(written.tasks)
        for task, of in written.tasks.items():
            assert read.tasks[task].metrics == of.metrics
            assert read.tasks[task].predictions.equals(of.predictions)


def test_accuracy_by_depth_is_in_the_order_of_the_blocks() -> None:
    by_block = {f"test/knn_top1_block{b}": float(b) for b in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    linear = ARMS[0].tasks["linear"]
    assert accuracy_by_depth(Outcome(linear.metrics | by_block, linear.predictions)) == list(range(11))
    assert accuracy_by_depth(linear) == []


def test_shuffling_test_labels_changes_no_champion() -> None:
    shuffled = []
    for a in ARMS:
        tasks = {}
        for task, of in a.tasks.items():
            rows = of.predictions.assign(label=of.predictions["label"].sample(frac=1, random_state=1).to_numpy())
            metrics = of.metrics | {name: 0.0 for name in of.metrics if name.startswith("test/")}
            tasks[task] = Outcome(metrics, rows)
        shuffled.append(ArmOutcomes(a.arm, tasks))
    assert champion(shuffled).arm == champion(ARMS).arm == "cl"


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
    worst = worst_mistakes(rows, 7)
    assert len(worst) == 7
    assert (worst["label"] != worst["prediction"]).all()
    assert worst["confidence"].is_monotonic_decreasing
    wrong = rows[rows["label"] != rows["prediction"]]
    assert worst["confidence"].tolist() == wrong["confidence"].nlargest(7).tolist()
    assert len(worst_mistakes(rows, 10**6)) == len(wrong)
    of_subsets = ARMS[0].tasks["fewshot-1pct"].predictions
    assert set(worst_mistakes(of_subsets, 10**6)["subset"]) == {0}


def test_html_is_whole_without_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    picture = b"\x89PNG some picture"
    (tmp_path / "figures" / "a.png").write_bytes(picture)
    rows = "| arm | top-1 |\n| --- | --- |\n| <graft> | 1 & 2 |"
    page = to_html(f"# Title\n\n{rows}\n\n![a](figures/a.png)\n", "T", tmp_path)
    assert "<h1>Title</h1>" in page
    assert "<td>&lt;graft&gt;</td>" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources] == [picture]


def test_absent_results_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match="run `dvc repro`"):
        read_results(tmp_path / "results.csv")


def test_report_is_written_whole(tmp_path: Path, params: Params, prepared: LabelledImages) -> None:
    arms = [arm("pixels", 0.95, 1.0, 3), *ARMS]
    metrics, predictions, folders = {}, {}, {}
    for a in arms:
        folders[a.arm] = tmp_path / a.arm
        folders[a.arm].mkdir()
        trained = {} if a.is_baseline else {"train/pflop_total": 1.5}
        (folders[a.arm] / "metrics.json").write_text(json.dumps(trained))
        tasks = {task: of for task, of in a.tasks.items() if not (a.is_baseline and task.startswith("finetune"))}
        for task, of in tasks.items():
            metrics[a.arm, task] = folders[a.arm] / f"{task}.json"
            predictions[a.arm, task] = folders[a.arm] / f"{task}.parquet"
            metrics[a.arm, task].write_text(json.dumps(of.metrics))
            of.predictions.to_parquet(predictions[a.arm, task])
    out = Outputs(
        *(tmp_path / name for name in ("results.csv", "per_class.csv", "report.md", "report.html", "pictures"))
    )
    out.figures.mkdir()
    assert write_report(params, prepared, Inputs(metrics, predictions, folders), out) == "cl"
    page, html = out.page.read_text(), out.html.read_text()
    assert f"{len(prepared.ids('train'))} train, 0 unlabeled, {len(prepared.ids('val'))} val" in page
    assert "fewest labels): **cl**" in page
    named = re.findall(r"\]\(figures/(\w+)\.png\)", page)
    assert named == ["label_efficiency", "accuracy_per_class", "confusion", "worst_mistakes"]
    assert sorted(f.stem for f in out.figures.iterdir()) == sorted(named)
    assert html.count('src="data:image/png;base64,') == 4
    header, rows = wide_rows(read_results(out.table))
    assert f"| {' | '.join(header)} |" in page
    assert [row[0] for row in rows] == ["pixels", "mim", "cl", "graft"]
    assert rows[0][-1] == "–"  # nobody fine-tunes pixels
    compute = page.split("## Compute")[1].split("Champion")[0]
    assert re.findall(r"^\| (\w+) \|", compute, re.MULTILINE) == ["arm", "mim", "cl", "graft"]
    assert len(pd.read_csv(out.classes)) == (4 * 4 - 1) * 10
