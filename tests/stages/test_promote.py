"""`lgp promote` where MLflow fails."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from made_models import make_encoder

from lgp.errors import LgpError
from stages.promote import promote


def test_store_that_fails_promotes_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "presets" / "digits.yaml", "params.yaml")
    make_encoder(Path("models/graft/encoder"), 1)
    monkeypatch.setattr("lgp.workflow.tracking.Store.__init__", failing)
    with pytest.raises(LgpError, match="so graft is not promoted"):
        promote("graft")
    assert "is the champion now" not in capsys.readouterr().out
