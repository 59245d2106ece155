"""Exported models: each format gives what timm gives, for an encoder of grey and a classifier of coloured images."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_models import CLASSES, by_timm, make_classifier, make_encoder
from safetensors.torch import load_file
from torch import Tensor, nn

from lgp.errors import LgpError
from lgp.models import exporting
from lgp.models.classifier_folder import Classifier, Head, save_classifier
from lgp.models.encoder_folder import save_tensors
from lgp.models.exporting import export_mae, export_onnx, export_program, load_model, new_output
from lgp.models.files import CONFIG, HEADS, WEIGHTS

MODELS = ("encoder", "classifier")
BATCHES = (1, 2, 5, 300)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    coloured = make_encoder(folder / "coloured/encoder", 3)
    return {
        "encoder": make_encoder(folder / "grey/encoder", 1),
        "classifier": make_classifier(folder / "coloured/classifiers/linear", coloured),
    }


class Restless(nn.Module):
    """A model that gives other values once it was traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) + (0 if torch.compiler.is_compiling() else 1)


def images_for(name: str, n: int) -> Tensor:
    return torch.randn(n, 1 if name == "encoder" else 3, 8, 8, generator=torch.Generator().manual_seed(n))


def expected_about(name: str) -> dict[str, Any]:
    channels = 1 if name == "encoder" else 3
    of_images = {
        "input_size": [channels, 8, 8],
        "mean": [0.3, 0.4, 0.6][:channels],
        "std": [0.2, 0.25, 0.3][:channels],
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    return of_images | ({"label_names": CLASSES} if name == "classifier" else {})


@pytest.mark.parametrize("name", MODELS)
def test_onnx_gives_what_timm_gives_for_any_number_of_images(
    name: str, models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    said = export_onnx(models[name], tmp_path / "a.onnx")
    assert capfd.readouterr() == ("", "")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    output = "logits (N, 5)" if name == "classifier" else "features (N, 16)"
    assert said.startswith(
        f"normalised images (N, {1 if name == 'encoder' else 3}, 8, 8) to {output}; onnxruntime differs"
    )
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in about.items()} == expected_about(name)
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("images", list(images_for(name, 1).shape[1:]))]
    assert [o.name for o in session.get_outputs()] == [output.split()[0]]
    for n in BATCHES:
        (outputs,) = session.run(None, {"images": images_for(name, n).numpy()})
        torch.testing.assert_close(torch.tensor(outputs), by_timm(models[name], images_for(name, n)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_program_gives_what_timm_gives_for_any_number_of_images(
    name: str, models: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export_program(models[name], tmp_path / "a.pt2")
    assert capfd.readouterr() == ("", "")
    extra = {"about.json": ""}
    program = torch.export.load(tmp_path / "a.pt2", extra_files=extra).module()
    assert json.loads(extra["about.json"]) == expected_about(name)
    for n in BATCHES:
        expected = by_timm(models[name], images_for(name, n))
        torch.testing.assert_close(program(images_for(name, n)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_mae_file_holds_the_tensors_and_the_statistics(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    export_mae(models[name], tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    weights = load_file(models[name] / WEIGHTS)
    assert content["model"].keys() == weights.keys()
    assert all(torch.equal(content["model"][key], tensor) for key, tensor in weights.items())
    assert content["pretrained_cfg"] == {key: expected_about(name)[key] for key in ("mean", "std")}
    assert ("head.weight" in weights) == (name == "classifier")


def test_mae_file_of_an_encoder_has_the_decoder_of_its_arm_and_that_of_a_classifier_has_none(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "mim/encoder", 1)
    classifier = make_classifier(tmp_path / "mim/classifiers/linear", encoder)
    save_tensors({"mae.mask_token": torch.ones(1, 1, 4)}, tmp_path / "mim" / HEADS)
    for folder, file in ((encoder, "e.pth"), (classifier, "c.pth")):
        export_mae(folder, tmp_path / file)
    of_encoder, of_classifier = (torch.load(tmp_path / f, weights_only=True)["model"] for f in ("e.pth", "c.pth"))
    assert torch.equal(of_encoder["mask_token"], torch.ones(1, 1, 4))
    assert "mask_token" not in of_classifier


def test_file_that_does_not_give_the_models_outputs_is_not_kept(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "load_model", lambda folder: Restless(load_model(folder)))
    with pytest.raises(LgpError, match="differs from the model by"), new_output(tmp_path / "out" / "a.pt2") as written:
        export_program(models["encoder"], written)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("missing", exporting.ONNX_PACKAGES)
def test_onnx_without_its_packages_says_what_to_install(
    missing: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    with pytest.raises(LgpError, match=rf"{missing}.*: pip install 'lgp\[export\]'"):
        export_onnx(models["encoder"], tmp_path / "a.onnx")


def test_pixels_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    pixels = make_encoder(tmp_path / "pixels/encoder", 1)
    (pixels / CONFIG).write_text(json.dumps({"architecture": "pixels", "pretrained_cfg": {}}))
    with pytest.raises(LgpError, match="stands for raw pixels, which have no weights to export"):
        load_model(pixels)
    with pytest.raises(LgpError, match="there is no encoder of arm 'none' yet"):
        load_model(tmp_path / "none/encoder")
    encoder = make_encoder(tmp_path / "mim/encoder", 1)
    tensors = load_file(encoder / WEIGHTS)
    save_tensors({name: tensor for name, tensor in tensors.items() if name != "norm.bias"}, encoder / WEIGHTS)
    with pytest.raises(LgpError, match=r"model\.safetensors is damaged or does not fit its config\.json.*norm\.bias"):
        load_model(encoder)
    (encoder / WEIGHTS).write_bytes(b"short")
    with pytest.raises(LgpError, match="is damaged"):
        load_model(encoder)


def fail_half_way(target: Path) -> None:
    with new_output(target) as written:
        written.write_text("half")
        raise OSError


def test_new_output_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.onnx"
    with pytest.raises(OSError):  # noqa: PT011 - that of the block
        fail_half_way(target)
    assert not list(target.parent.iterdir())
    with new_output(target) as written:
        assert written.name == "a.onnx"
        written.write_text("whole")
        written.with_name("a.onnx.data").write_text("weights")
        assert not target.exists()
    assert {p.name: p.read_text() for p in target.parent.iterdir()} == {"a.onnx": "whole", "a.onnx.data": "weights"}
    with pytest.raises(LgpError, match=r"a\.onnx exists already: move it away"):
        fail_half_way(target)
    assert target.read_text() == "whole"


def test_classifier_whose_head_timm_has_no_place_for_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """Its folder loads as an encoder alone, which is not what was asked for."""
    encoder = models["classifier"].parent.parent / "encoder"
    head = Head(np.zeros((5, 16)), np.zeros(5), normalized=True)
    save_classifier(tmp_path / "c", encoder, Classifier(1.0, head), CLASSES, {"metrics": {}})
    with pytest.raises(LgpError, match="has no place in timm"):
        load_model(tmp_path / "c")
