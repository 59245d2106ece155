"""The classifier of `lgp predict` without --with: the champion, or the best on val and a line that says so."""

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
