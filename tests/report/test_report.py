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
from lgp.evaluate.statistics import Gap, holm, paired_gap
from lgp.features.cache import Features
from lgp.params.evaluate import FeatureParams
from lgp.params.file import Params
from lgp.report.figures import plot_label_efficiency
from lgp.report.outcomes import (
    ArmOutcomes,
    Inputs,
    accuracy_by_depth,
    accuracy_per_class,
    correct_by_subset,
    fewest_labels,
    leader,
    worst_mistakes,
)
from lgp.report.page import to_html
from lgp.report.pairs import Pair, compare
from lgp.report.report import Outputs, write_report
from lgp.report.table import COLUMNS, per_class_table, read_results, read_verdict, results_table, task_name, wide_rows

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
    knn = {"knn_k": 20.0, "test/knn_top1": 88.0, "test/knn_top1_low": 74.0, "test/knn_top1_high": 95.0}
    linear = Outcome(linear.metrics | knn, linear.predictions)
    few = {f"fewshot-{n}": outcome(3, labels, accuracy, val, seed) for n, labels in (("1pct", 10), ("10pct", 100))}
    return ArmOutcomes(name, {"linear": linear, **few, "finetune-10pct": outcome(3, 100, accuracy, val, seed + 9)})


ARMS = [arm("mim", 0.5, 0.4, 0), arm("cl", 0.6, 1.0, 1), arm("graft", 0.9, 0.6, 2)]


def test_table_has_the_contracts_columns_and_rows() -> None:
    found = results_table(ARMS)
    assert list(found.columns) == COLUMNS
    assert found["task"].tolist()[:5] == ["knn", "linear", "fewshot-1pct", "fewshot-10pct", "finetune-10pct"]
    assert len(found) == 15
    knn, few, metrics = found.iloc[0], found.iloc[12], ARMS[2].tasks["fewshot-1pct"].metrics
    assert knn.tolist() == ["mim", "knn", 1000, 88.0, 0.0, 1, 74.0, 95.0]
    assert few.tolist()[:3] == ["graft", "fewshot-1pct", 10]
    assert few["top1_mean"] == metrics["test/top1"]
    assert (few["top1_low"], few["top1_high"]) == (metrics["test/top1_low"], metrics["test/top1_high"])


def test_metrics_without_intervals_say_what_to_run() -> None:
    tasks = {"linear": Outcome({"test/top1": 90.0, "labels": 10.0, "subsets": 1.0}, pd.DataFrame())}
    with pytest.raises(
        LgpError, match=r"metrics/mim-linear.json .* without test/knn_top1_low: run linear of every arm"
    ):
        results_table([ArmOutcomes("mim", tasks)])


def test_table_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("arm,task,labels,top1_mean,top1_std,subsets,top1_ci95\nmim,knn,9,1,0,1,2\n")
    with pytest.raises(LgpError, match="of an older version, without top1_low, top1_high: run `dvc repro` again"):
        read_results(tmp_path / "results.csv")
    with pytest.raises(LgpError, match=r"no verdict in .*verdict.txt, which belongs to the table: run `lgp report`"):
        read_verdict(tmp_path / "verdict.txt")


def test_error_bars_reach_from_low_to_high(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[np.ndarray]] = {}

    def noted(_: object, x: pd.Series, y: pd.Series, yerr: list[pd.Series], label: str, **__: object) -> None:
        drawn.setdefault(label, [np.asarray(y - yerr[0]), np.asarray(y + yerr[1])])

    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", noted)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda _: None)
    plot_label_efficiency(tmp_path / "figure.png", results_table(ARMS), CLASSES)
    metrics = ARMS[0].tasks["fewshot-1pct"].metrics
    assert [ends[0] for ends in drawn["mim"]] == pytest.approx([metrics["test/top1_low"], metrics["test/top1_high"]])


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
    assert rows[2][3] == f"{few['top1_mean']:.1f} [{few['top1_low']:.1f}, {few['top1_high']:.1f}]"


@pytest.mark.parametrize(
    ("task", "name"),
    [("fewshot-5shot", "5 a class"), ("finetune-all", "fine-tuned, all"), ("fewshot-official", "official")],
)
def test_tasks_have_names_for_people(task: str, name: str) -> None:
    assert task_name(task) == name


def test_every_two_arms_are_compared_on_the_same_images() -> None:
    by_arm = {x.arm: x for x in ARMS}
    found = compare(ARMS)
    assert len(found) == 4 * 3
    for pair in found:
        ahead, behind = by_arm[pair.ahead], by_arm[pair.behind]
        assert ahead.tasks[pair.task].metrics["test/top1"] > behind.tasks[pair.task].metrics["test/top1"]
        assert pair.gap == paired_gap(*correct_by_subset(ahead.tasks[pair.task], behind.tasks[pair.task], ""))
    # who is ahead does not depend on the order of the arms
    assert {(p.task, p.ahead, p.behind) for p in compare(ARMS[::-1])} == {(p.task, p.ahead, p.behind) for p in found}


def test_pairs_are_adjusted_for_the_whole_table() -> None:
    found = compare(ARMS)
    assert [pair.p for pair in found] == holm([pair.gap.p for pair in found])
    fewer = compare(ARMS, left_out=["linear"])
    assert {pair.task for pair in fewer} == {"fewshot-1pct", "fewshot-10pct", "finetune-10pct"}
    assert [pair.p for pair in fewer] == holm([pair.gap.p for pair in fewer])


@pytest.mark.parametrize(
    ("points", "p", "sentence"),
    [
        (5.0, 0.04, "a beats b by 5.0 points"),
        (5.0, 0.06, "a and b are undecided: a is ahead by 5.0 points"),
        (0.0, 1.0, "a and b are undecided: a tie"),
    ],
)
def test_pair_says_who_beats_whom_by_its_adjusted_p(points: float, p: float, sentence: str) -> None:
    pair = Pair("linear", "a", "b", Gap(points, points - 3, points + 3, 0.001, 5, 5), p)
    assert (pair.sentence(pair.beats), pair.interval()) == (sentence, f"[{points - 3:+.1f}, {points + 3:+.1f}]")


def test_predictions_are_lined_up_by_subset_and_image() -> None:
    outcome_of_few = ARMS[0].tasks["fewshot-1pct"]
    rows = outcome_of_few.predictions
    right, same = correct_by_subset(Outcome({}, rows.sample(frac=1, random_state=0)), outcome_of_few, "")
    assert right.shape == (3, IMAGES)
    assert np.array_equal(right, same)
    others = Outcome({}, rows.assign(id=rows["id"] + 1))
    with pytest.raises(LgpError, match="predictions of mim and cl in x are of different subsets or test images: run"):
        correct_by_subset(outcome_of_few, others, "mim and cl in x")


def test_leader_is_chosen_on_validation_not_test() -> None:
    assert leader(ARMS) is ARMS[1]


def test_baseline_never_leads() -> None:
    baselines = [arm(name, 0.9, 1.0, 3) for name in ("pixels", "random")]
    assert [a.is_baseline for a in (*baselines, *ARMS)] == [True, True, False, False, False]
    assert leader([*baselines, ARMS[0], ARMS[2]]) is ARMS[2]
    assert leader(baselines) is None
    other = arm("other", 0.1, 1.0, 3)  # an imported one may
    assert leader([ARMS[0], other]) is other


def test_arm_whose_checks_failed_never_leads() -> None:
    failed = ArmOutcomes("cl", ARMS[1].tasks, trained=False)
    assert leader([ARMS[0], failed, ARMS[2]]) is ARMS[2]


def test_fewest_labels_are_those_of_a_task_on_frozen_features() -> None:
    tasks = ARMS[0].tasks | {"finetune-1shot": outcome(3, 5, 0.5, 0.5, 0), "fewshot-1shot": outcome(3, 5, 0.5, 0.5, 0)}
    assert fewest_labels(ARMS) == "fewshot-1pct"
    assert fewest_labels([ArmOutcomes("mim", tasks)]) == "fewshot-1shot"


def test_outcomes_are_read_by_arm_and_task(tmp_path: Path) -> None:
    metrics, predictions, folders = {}, {}, {}
    for a in ARMS:
        folders[a.arm] = tmp_path / a.arm
        folders[a.arm].mkdir()
        checked = {"mim": {}, "cl": {"trained": False}, "graft": {"trained": True}}[a.arm]
        (folders[a.arm] / "metrics.json").write_text(json.dumps(checked))
        for task, of in a.tasks.items():
            metrics[a.arm, task] = tmp_path / f"{a.arm}-{task}.json"
            predictions[a.arm, task] = tmp_path / f"{a.arm}-{task}.parquet"
            metrics[a.arm, task].write_text(json.dumps(of.metrics))
            of.predictions.to_parquet(predictions[a.arm, task])
    found = Inputs(metrics, predictions, folders).read()
    assert [(a.arm, a.trained) for a in found] == [("mim", True), ("cl", False), ("graft", True)]
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


def test_shuffling_test_labels_changes_no_leader() -> None:
    shuffled = []
    for a in ARMS:
        tasks = {}
        for task, of in a.tasks.items():
            rows = of.predictions.assign(label=of.predictions["label"].sample(frac=1, random_state=1).to_numpy())
            metrics = of.metrics | {name: 0.0 for name in of.metrics if name.startswith("test/")}
            tasks[task] = Outcome(metrics, rows)
        shuffled.append(ArmOutcomes(a.arm, tasks))
    found = leader(shuffled)
    assert found is not None
    assert found.arm == "cl"


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


def features_of(arm: str) -> Features:
    """Features of the test images, and of no others."""
    assert arm == "cl"  # the leader
    x = np.random.default_rng(0).normal(size=(IMAGES, 8)).astype(np.float32)
    return Features({"test": x}, {}, {"test": 100 + np.arange(IMAGES)}, CLASSES, {}, FeatureParams())


def written(folder: Path, arms: list[ArmOutcomes]) -> tuple[Inputs, Outputs]:
    """Write the outcomes as the stages do, and name the files of the report."""
    metrics, predictions, folders = {}, {}, {}
    for a in arms:
        folders[a.arm] = folder / a.arm
        folders[a.arm].mkdir()
        trained = {} if a.is_baseline else {"train/pflop_total": 1.5, "trained": a.trained}
        (folders[a.arm] / "metrics.json").write_text(json.dumps(trained))
        tasks = {task: of for task, of in a.tasks.items() if not (a.is_baseline and task.startswith("finetune"))}
        for task, of in tasks.items():
            metrics[a.arm, task] = folders[a.arm] / f"{task}.json"
            predictions[a.arm, task] = folders[a.arm] / f"{task}.parquet"
            metrics[a.arm, task].write_text(json.dumps(of.metrics))
            of.predictions.to_parquet(predictions[a.arm, task])
    names = ("results.csv", "verdict.txt", "per_class.csv", "report.md", "report.html", "pictures")
    out = Outputs(*(folder / name for name in names))
    out.figures.mkdir()
    return Inputs(metrics, predictions, folders), out


def test_report_is_written_whole(
    tmp_path: Path, params: Params, prepared: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lgp.report.verdict.small_validation", lambda images: "")
    inputs, out = written(tmp_path, [arm("pixels", 0.05, 1.0, 3), *ARMS])
    judged = write_report(params, prepared, inputs, features_of, out)
    assert judged.champion == "cl"
    page, html = out.page.read_text(), out.html.read_text()
    verdict = read_verdict(out.verdict)
    assert verdict[1].startswith("cl is the champion: it has the best validation accuracy with the fewest labels (1 %)")
    assert verdict[2].startswith(
        "Grafting on mim changes the accuracy of frozen features, in points: 1 % (10 labels) +"
    )
    assert " ".join(page.split()).startswith(f"# Label efficiency **{verdict[0]}** {verdict[1]} {verdict[2]}")
    assert f"{len(prepared.ids('train'))} train, 0 unlabeled, {len(prepared.ids('val'))} val" in page
    assert "leader of the pictures (best validation accuracy at the fewest labels) is cl" in page
    assert "k-NN is of 20 neighbours, by the cosine of the features that" in " ".join(page.split())
    assert "The table makes 21 comparisons" in " ".join(page.split())
    named = re.findall(r"\]\(figures/(\w+)\.png\)", page)
    assert named == ["label_efficiency", "map", "accuracy_per_class", "reliability", "confusion", "worst_mistakes"]
    assert sorted(f.stem for f in out.figures.iterdir()) == sorted(named)
    assert html.count('src="data:image/png;base64,') == 5  # the map is live
    assert html.count('<div id="map">') == 1
    header, rows = wide_rows(read_results(out.table))
    assert f"| {' | '.join(header)} |" in page
    assert [row[0] for row in rows] == ["pixels", "mim", "cl", "graft"]
    assert rows[0][-1] == "–"  # nobody fine-tunes pixels
    compute = page.split("## Compute")[1].split("The leader")[0]
    assert re.findall(r"^\| (\w+) \|", compute, re.MULTILINE) == ["arm", "mim", "cl", "graft"]
    assert len(pd.read_csv(out.classes)) == (4 * 4 - 1) * 10


def test_report_takes_the_start_of_the_graft_from_the_parameters(
    tmp_path: Path, params: Params, prepared: LabelledImages
) -> None:
    inputs, out = written(tmp_path, ARMS)
    policy = ["stage_lr", "cl_end"]
    values = params.model_dump() | {
        "graft": params.graft.model_dump() | {"start": "cl", "end": "mim", "policy": policy}
    }
    write_report(Params.model_validate(values), prepared, inputs, features_of, out)
    assert any("Grafting on cl changes" in line for line in read_verdict(out.verdict))


def test_report_crowns_nobody_where_pixels_are_ahead(tmp_path: Path, params: Params, prepared: LabelledImages) -> None:
    inputs, out = written(tmp_path, [arm("pixels", 1.0, 1.0, 3), *ARMS])
    assert write_report(params, prepared, inputs, features_of, out).champion is None
    said = read_verdict(out.verdict)[0]
    assert said.startswith(
        "Nobody is crowned. With the fewest labels (1 %), pixels (100.0 %) is ahead of every trained"
    )
    assert " ".join(out.page.read_text().split()).startswith(f"# Label efficiency **{said}**")


def test_report_without_any_trained_arm_has_no_pictures_of_a_leader(
    tmp_path: Path, params: Params, prepared: LabelledImages
) -> None:
    inputs, out = written(tmp_path, [ArmOutcomes(a.arm, a.tasks, trained=False) for a in ARMS])
    assert write_report(params, prepared, inputs, features_of, out).champion is None
    said = read_verdict(out.verdict)
    assert said[0] == "Nobody is crowned. No arm has a training that passed its checks."
    assert "mim is not trained: its checks failed. It is never the champion." in said
    assert [f.stem for f in out.figures.iterdir()] == ["label_efficiency"]
