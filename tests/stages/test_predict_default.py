"""The classifier of `lgp predict` without --with: the champion, else what val or labels choose, and how it says so."""

import json
from pathlib import Path

import pytest
from made_models import make_classifier, make_encoder

from lgp.models.files import PROVENANCE, encoder_digest
from lgp.params.run import RunParams
from stages import predict

SETTINGS = RunParams()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one kept classifier and no store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    encoder = make_encoder(Path("models/cl/encoder"), 1)
    folder = make_classifier(Path("models/cl/classifiers/linear"), encoder)
    metrics = {"val/top1": 50.0, "labels": 10, "encoder": encoder_digest(encoder)}
    (folder / PROVENANCE).write_text(json.dumps({"metrics": metrics}))
    return folder


def test_without_a_store_the_best_on_val_is_taken_and_no_store_is_made(
    kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict._champion(SETTINGS) == kept
    assert (
        f"no champion is registered (`lgp report` crowns a clear winner, `lgp promote ARM` any arm), so {kept} is"
        in (capsys.readouterr().out)
    )
    assert not Path("mlflow.db").exists()


@pytest.mark.parametrize(
    ("val", "taken", "how"),
    [
        (92, "linear", "the best on val of those with the most labels (val has 92 images, so"),
        (93, "fewshot-1pct", "the best on val\n"),
        (None, "fewshot-1pct", "the best on val\n"),  # classifiers that came without their evaluation
    ],
)
def test_where_val_is_too_small_to_choose_by_labels_choose(
    val: int | None, taken: str, how: str, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = Path("models/cl/encoder")
    for task, top1, labels in (("fewshot-1pct", 88.9, 50), ("fewshot-all", 61.1, 141), ("linear", 66.7, 141)):
        folder = make_classifier(kept.with_name(task), encoder)
        metrics = {"val/top1": top1, "labels": labels, "encoder": encoder_digest(encoder)}
        (folder / PROVENANCE).write_text(json.dumps({"metrics": metrics}))
    if val is not None:
        Path("metrics").mkdir()
        Path("metrics/labels.json").write_text(json.dumps({"images/val": val}))
    assert predict._champion(SETTINGS) == kept.with_name(taken)
    assert f"so {kept.with_name(taken)} is taken, {how}" in capsys.readouterr().out


def test_champion_of_the_store_is_taken(
    kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mlflow.db").touch()
    crowned = Path("elsewhere")
    monkeypatch.setattr("lgp.workflow.tracking.Tracker.champion_classifier", lambda *_: crowned)
    assert predict._champion(SETTINGS) == crowned
    assert "elsewhere is the champion of the registry" in capsys.readouterr().out
    monkeypatch.setattr("lgp.workflow.tracking.Tracker.champion_classifier", lambda *_: None)
    assert predict._champion(SETTINGS) == kept
