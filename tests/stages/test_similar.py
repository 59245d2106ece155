"""`lgp embed` and `lgp similar`: features of one form are compared, and of another are not."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, merged
from made_models import make_encoder
from PIL import Image

from lgp.errors import LgpError
from stages.embed import embed
from stages.similar import similar


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with an encoder and a folder of four images."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "presets" / "digits.yaml", "params.yaml")
    make_encoder(Path("models/graft/encoder"), 1)
    Path("some").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(f"some/{number}.png")
    return tmp_path


def test_features_that_were_pooled_otherwise_are_not_compared(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed("some", Path("e.parquet"))
    capsys.readouterr()
    similar(Path("some/2.png"), Path("e.parquet"), 1)
    assert capsys.readouterr().out == "1.0000  2.png\n"
    values = merged(yaml.safe_load(Path("params.yaml").read_text()), {"features": {"pool": "average"}})
    Path("params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(
        LgpError, match=r"has features of class_token of the last 1 blocks, params.yaml asks for average"
    ):
        similar(Path("some/2.png"), Path("e.parquet"), 1)


def test_folder_without_a_readable_image_is_said(project: Path) -> None:
    Path("damaged").mkdir()
    Path("damaged/cut.png").write_bytes(b"no image")
    with pytest.raises(LgpError, match=r"no row to write into e.parquet: no image can be read"):
        embed("damaged", Path("e.parquet"))
