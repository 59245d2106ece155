"""The results table and what is read off it."""

from pathlib import Path

import pandas as pd
import pytest

from lgp.errors import LgpError
from lgp.evaluate.outcome import ArmResults
from lgp.report import champion, paired_gap, results_table, write_page
from lgp.results import read_results, wide_rows


def arm(name: str, offset: float, val: float) -> ArmResults:
    def fewshot(labels: int, mean: float) -> dict[str, float]:
        subsets = {f"test/top1_subset{i}": mean + offset + i for i in range(3)}
        return {
            "test/top1": mean + offset + 1,
            "test/top1_std": 1.0,
            "val/top1": val,
            "labels": labels,
            "subsets": 3,
        } | subsets

    linear = {"test/top1": 90.126 + offset, "test/knn_top1": 88.0, "labels": 1000}
    return ArmResults(name, linear, {"1pct": fewshot(10, 50.0), "10pct": fewshot(100, 80.0)})


ARMS = [arm("mim", 0, 40), arm("cl", 2, 70), arm("graft", 5, 60)]


def test_table_has_the_contracts_columns_and_rows() -> None:
    table = results_table(ARMS)
    assert list(table.columns) == ["arm", "task", "labels", "top1_mean", "top1_std", "subsets"]
    assert table.iloc[0].tolist() == ["mim", "knn", 1000, 88.0, 0.0, 1]
    assert table.iloc[1].tolist() == ["mim", "linear", 1000, 90.13, 0.0, 1]
    assert table.iloc[10].tolist() == ["graft", "fewshot-1pct", 10, 56.0, 1.0, 3]
    assert len(table) == 12


def test_table_is_printed_a_line_per_arm(tmp_path: Path) -> None:
    results_table(ARMS).to_csv(tmp_path / "results.csv", index=False)
    header, rows = wide_rows(read_results(tmp_path / "results.csv"))
    assert header == ["arm", "k-NN (1000 labels)", "linear (1000 labels)", "1 % (10 labels)", "10 % (100 labels)"]
    assert rows[2] == ["graft", "88.0", "95.1", "56.0 ± 1.0", "86.0 ± 1.0"]


def test_gap_is_paired_by_subset() -> None:
    a, b = ARMS[2].fewshot["1pct"], dict(ARMS[1].fewshot["1pct"])
    assert paired_gap(a, b) == (pytest.approx(3), pytest.approx(0), 3, 3)
    b["test/top1_subset0"] += 9
    gap, error, won, of = paired_gap(a, b)
    assert (gap, won, of) == (pytest.approx(0), 2, 3)
    assert error == pytest.approx(pd.Series([-6, 3, 3]).sem())


def test_champion_is_chosen_on_validation_not_test() -> None:
    assert champion(ARMS) == "cl"


def test_page_names_gaps_compute_and_pictures(tmp_path: Path) -> None:
    write_page(
        tmp_path / "report.md",
        "What was trained.",
        results_table(ARMS),
        ARMS,
        {"mim": 0.5, "cl": 2, "graft": 1.5},
        "cl",
        ["label_efficiency.png"],
    )
    page = (tmp_path / "report.md").read_text()
    assert "| graft over mim | 1 % | +5.0 ± 0.0 | 3 of 3 |" in page
    assert "| graft over cl | 10 % | +3.0 ± 0.0 | 3 of 3 |" in page
    assert "| graft | 1.5 |" in page
    assert "What was trained." in page
    assert "(figures/label_efficiency.png)" in page


def test_absent_results_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match="run `dvc repro`"):
        read_results(tmp_path / "results.csv")
