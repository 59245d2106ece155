"""`lgp export` as its users call it, and the code of docs/elsewhere.md, run as written."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from made_models import CLASSES, by_timm, make_classifier, make_encoder
from PIL import Image
from typer.testing import CliRunner

from cli import app
from lgp.models.encoder_folder import save_tensors
from lgp.models.files import CONFIG, HEADS


def lgp(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def error_of(result: Any) -> str:
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    return str(line)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the arm `graft`, a classifier on top of it, and an image file."""
    monkeypatch.chdir(tmp_path)
    encoder = make_encoder(Path("models/graft/encoder"), 3)
    save_tensors({}, Path("models/graft") / HEADS)
    make_classifier(Path("models/graft/classifiers/linear"), encoder)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save("photo.png")
    return tmp_path


@pytest.mark.parametrize("source", ["graft", "models/graft/classifiers/linear"])
def test_every_format_of_an_arm_and_of_a_folder(source: str, project: Path) -> None:
    for file in ("out/a.pt2", "out/a.pth", "out/a"):
        result = lgp("export", source, file)
        assert result.exit_code == 0, result.output
        (line,) = result.output.splitlines()
        assert line.startswith(f"{file}: ")
        assert error_of(lgp("export", source, file)).startswith(f"error: {file} exists already: move it away")
    assert sorted(p.name for p in (project / "out").iterdir()) == ["a", "a.pt2", "a.pth"]
    folder = Path("models/graft/encoder") if source == "graft" else Path(source)
    images = torch.randn(2, 3, 8, 8)
    expected = by_timm(folder, images)
    assert torch.equal(by_timm(Path("out/a"), images), expected)
    torch.testing.assert_close(torch.export.load("out/a.pt2").module()(images), expected, atol=1e-5, rtol=0)
    names = torch.load("out/a.pth", weights_only=True)["model"]
    assert ("head.weight" in names) == (source != "graft")


@pytest.mark.parametrize("suffix", [".safetensors", ".pkl", ".pt", ".onnx2", ".PTH", ".v2"])
def test_another_suffix_is_refused_and_the_four_are_named(suffix: str, project: Path) -> None:
    error = error_of(lgp("export", "graft", f"a{suffix}"))
    assert error.startswith(f"error: a{suffix}: {suffix} is no format of `lgp export`: choose .onnx (ONNX), .pt2 ")
    assert error.endswith("(MAE's layout), no suffix (a folder for the Hugging Face Hub)")
    assert not list(project.glob("a*"))


@pytest.mark.parametrize("name", [".safetensors", ".pth"])
def test_name_that_is_all_suffix_is_no_folder(name: str, project: Path) -> None:
    assert f"{name} is no format" in error_of(lgp("export", "graft", name))
    assert not (project / name).exists()


def test_what_is_no_model_is_refused(project: Path) -> None:
    assert "there is no encoder of arm 'grfat' yet" in error_of(lgp("export", "grfat", "a.pth"))
    for source in ("models/graft", "./nothing", "Graft"):
        error = error_of(lgp("export", source, "a.pth"))
        assert error.startswith(f"error: {source} is neither the name of an arm nor a folder with config.json and ")
    shutil.copytree("models/graft/classifiers/linear", "graft")  # beside an arm of that name
    assert lgp("export", "graft", "arm.pth").exit_code == 0
    assert lgp("export", "./graft", "folder.pth").exit_code == 0
    arm, folder = (torch.load(f, weights_only=True)["model"] for f in ("arm.pth", "folder.pth"))
    assert ("head.weight" in arm, "head.weight" in folder) == (False, True)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """Return images (N, H, W, C) uint8 as the encoder of the project takes them, computed apart from lgp and timm."""
    statistics = json.loads(Path("models/graft/encoder", CONFIG).read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(statistics[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std


def test_code_of_the_page_gives_features_and_probabilities(project: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    page = (ROOT / "docs" / "elsewhere.md").read_text(encoding="utf-8")
    commands = re.findall(r"^lgp export \S+ \S+", page, re.MULTILINE)
    for command in commands:
        result = lgp(*command.split()[1:])
        assert result.exit_code == 0, result.output
    by_name: dict[str, dict[str, Any]] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        names: dict[str, Any] = {}
        exec(code, names)
        by_name[re.findall(r"# (\w+)", code)[0]] = names
    assert by_name.keys() == {"timm", "classifier", "onnx", "program"}
    photo = np.array(Image.open("photo.png"))[None]
    encoder, classifier = Path("models/graft/encoder"), Path("models/graft/classifiers/linear")
    torch.testing.assert_close(by_name["timm"]["features"], by_timm(encoder, normalised(photo)))
    torch.testing.assert_close(by_name["program"]["features"], by_timm(encoder, normalised(photo)))
    probabilities = by_timm(classifier, normalised(photo)).softmax(dim=1)
    torch.testing.assert_close(by_name["classifier"]["probabilities"], probabilities, atol=1e-5, rtol=0)
    assert by_name["classifier"]["name"] == by_name["onnx"]["name"] == CLASSES[int(probabilities.argmax())]
    of_onnx = torch.from_numpy(by_name["onnx"]["probabilities"])
    torch.testing.assert_close(of_onnx, probabilities, atol=1e-5, rtol=0)
