"""The comparison over arms, parameters and seeds: what is one group, its interval, and the paired gap."""

import json
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lgp.evaluate.statistics import paired_gap, students_interval
from lgp.workflow.addresses import compare_address, models_address, runs_address
from lgp.workflow.comparison import HEADER, grouped, rows
from lgp.workflow.mlflow_store import TrackedResult


def result(arm: str, seed: str | None, top1: float, **params: str) -> TrackedResult:
    """A tracked evaluation of an encoder with a seed and `encoder.` parameters."""
    of_seed = {} if seed is None else {"encoder.seed": seed}
    own = {"encoder.digest": f"{arm}{seed}{params}", "seed": "5", "arm": arm, "task": "linear"}
    of_encoder = {f"encoder.{key}": value for key, value in params.items() if key in ("policy", "objective")}
    tags = {"encoder_params": json.dumps({"seed": seed} | {f"graft.{key}": value for key, value in params.items()})}
    metrics = {"test/top1": top1, "test/top1_low": top1 - 5, "test/top1_high": top1 + 4, "labels": 10.0}
    return TrackedResult(f"{arm}-{seed}-{top1}", arm, tags, own | of_seed | of_encoder, metrics, 0)


def none(_: TrackedResult) -> None:
    """Have no predictions."""


def cells(results: list[TrackedResult], predictions: Mapping[str, pd.DataFrame] | None = None) -> list[dict[str, str]]:
    read = none if predictions is None else lambda run: predictions[run.run_id]
    return [dict(zip(HEADER, row, strict=True)) for row in rows(grouped(results), read)]


def test_seeds_of_one_recipe_are_one_row_with_students_interval() -> None:
    (row,) = cells([result("cl", seed, top1) for seed, top1 in (("10", 70.0), ("9", 72.0), ("8", 75.0))])
    low, high = stats.ttest_1samp([70.0, 72.0, 75.0], 0).confidence_interval(0.95)
    assert (row["arm"], row["seeds"], row["mean"]) == ("cl", "8, 9, 10", "72.3")
    assert row["95 % interval"] == f"[{low:.1f}, {high:.1f}]"
    assert row["behind the first"] == "–"


def test_single_seed_has_the_interval_of_its_run() -> None:
    (row,) = cells([result("cl", "1", 70.0)])
    assert row["95 % interval"] == "[65.0, 74.0]"


def test_newest_run_of_a_seed_counts() -> None:
    (row,) = cells([result("cl", "1", 70.0), result("cl", "1", 10.0)])
    assert row["mean"] == "70.0"


def test_other_parameters_or_labels_are_another_row_that_names_them() -> None:
    more = result("graft", "1", 90.0, policy="['freeze']", epochs="60")
    more.metrics["labels"] = 20.0  # type: ignore[index]
    long = result("graft", "1", 80.0, policy="['freeze']", epochs="60")
    short = result("graft", "1", 70.0, policy="['stage_lr']", epochs="20")
    found = cells([more, long, short, result("cl", "1", 60.0, objective="simclr")])
    assert [row["differs in"] for row in found] == [
        "graft.epochs=60, labels=20",
        "graft.epochs=60, labels=10",
        "graft.epochs=20, labels=10",
        "–",
    ]
    assert [row["policy"] for row in found] == ["[freeze]", "[freeze]", "[stage_lr]", "–"]
    assert found[3]["objective"] == "simclr"


def test_run_that_names_no_encoder_is_left_out() -> None:
    unknown = TrackedResult("a", "cl", {}, {}, {"test/top1": 99.0, "labels": 10.0}, 0)
    assert [row["mean"] for row in cells([unknown, result("cl", "1", 70.0)])] == ["70.0"]


def test_gap_is_paired_by_the_seeds_in_common() -> None:
    first, other = {"1": 80.0, "2": 70.0, "3": 95.0}, {"1": 75.0, "2": 66.0, "4": 10.0, "3": 89.0}
    results = [result("graft", *entry) for entry in first.items()] + [result("cl", *entry) for entry in other.items()]
    low, high = stats.ttest_rel([80.0, 70.0, 95.0], [75.0, 66.0, 89.0]).confidence_interval(0.95)
    assert cells(results)[1]["behind the first"] == f"5.0 [{low:+.1f}, {high:+.1f}] (3 seeds)"
    apart = [result("graft", "1", 80.0), result("cl", "2", 70.0), result("cl", "3", 70.0)]
    assert cells(apart)[1]["behind the first"] == "no seed in common"


def test_gap_of_a_single_seed_is_paired_by_subset_and_image() -> None:
    drawn = np.random.default_rng(0)
    right = {"graft-1-90.0": drawn.random((3, 40)) < 0.9, "cl-1-60.0": drawn.random((3, 40)) < 0.6}
    index = {"subset": np.repeat([0, 1, 2], 40), "id": np.tile(np.arange(40), 3), "label": 0}
    tables = {
        run: pd.DataFrame(index | {"prediction": (~of_run).ravel().astype(int)}).sample(frac=1, random_state=1)
        for run, of_run in right.items()
    }
    results = [result("cl", "1", 60.0), result("graft", "1", 90.0)]
    gap = paired_gap(*right.values())
    assert cells(results, tables)[1]["behind the first"] == f"30.0 [{gap.low:+.1f}, {gap.high:+.1f}]"
    assert cells(results)[1]["behind the first"] == "30.0 (no predictions)"
    tables["cl-1-60.0"] = tables["cl-1-60.0"].assign(id=lambda table: table["id"] + 1)
    assert cells(results, tables)[1]["behind the first"] == "30.0 (other images)"


def test_imported_encoder_without_a_seed_is_compared_on_images() -> None:
    found = cells([result("graft", "1", 80.0), result("dino", None, 70.0)])
    assert (found[1]["seeds"], found[1]["behind the first"]) == ("–", "10.0 (no predictions)")


def test_interval_over_seeds_is_students() -> None:
    low, high = stats.ttest_1samp([1.0, 4.0, 2.0], 0).confidence_interval(0.95)
    assert students_interval([1.0, 4.0, 2.0]) == pytest.approx((low, high))


def test_addresses_open_the_pages_that_they_name() -> None:
    compare = urlsplit(urlsplit(compare_address("http://127.0.0.1:5000", "3", ["a", "b"])).fragment)
    asked = parse_qs(compare.query)
    assert compare.path == "/compare-runs"
    assert compare.query.startswith("runs=")  # MLflow does not find them elsewhere
    assert (json.loads(asked["runs"][0]), json.loads(asked["experiments"][0])) == (["a", "b"], ["3"])
    runs = urlsplit(urlsplit(runs_address("http://127.0.0.1:5000", "3", "linear")).fragment)
    asked = parse_qs(runs.query)
    assert runs.path == "/experiments/3/runs"
    assert asked["searchFilter"] == ["tags.task = 'linear'"]
    assert (asked["orderByKey"], asked["workflowType"]) == (["metrics.`test/top1`"], ["machine_learning"])
    models = "http://h/#/experiments/3/models?workflowType=machine_learning&viewMode=CHART"
    assert models_address("http://h", "3") == models
