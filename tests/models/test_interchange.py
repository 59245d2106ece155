"""Checkpoints of other projects, made here from a timm ViT of known weights, in; and out in MAE's layout."""

import argparse
import json
import pathlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import FOREIGN, merged
from safetensors.torch import save_file
from torch import Tensor

from lgp.data.normalization import Normalization
from lgp.errors import LgpError
from lgp.models.heads import mlp
from lgp.models.interchange import Imported, export_checkpoint, few_faults, import_checkpoint
from lgp.models.layouts import IMAGENET
from lgp.models.mae import MAE
from lgp.models.vit import ARCHITECTURE, model_args
from lgp.params.file import Params

Tensors = dict[str, Tensor]


@pytest.fixture
def vit(params: Params) -> Any:
    """A timm ViT of the parameters' dimensions whose every weight is random."""
    model = timm.create_model(ARCHITECTURE, num_classes=10, **model_args(params.model, params.data))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def read(path: Path, params: Params, partial: bool = False) -> Imported:
    """Import a file of grey images, whose statistics no layout has."""
    return import_checkpoint(path, params.model, params.data, partial, FOREIGN)


def encoder_of(vit: Any) -> Tensors:
    return {name: t for name, t in vit.state_dict().items() if not name.startswith("head.")}


def mae_pretraining(vit: Any, path: Path) -> Path:
    mae = MAE(vit, 0.75, 16, 1, 2).state_dict()
    tensors = encoder_of(vit) | {name: t for name, t in mae.items() if not name.startswith("encoder.")}
    arguments = argparse.Namespace(model="mae_vit_base_patch16", batch_size=64)
    torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 799, "args": arguments}, path / "mae.pth")
    return path / "mae.pth"


class WindowsPath:
    """Pickles as a path of Windows does, on any system."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pathlib.WindowsPath, ("C:\\", "jobs"))


def mae_multi_node(vit: Any, path: Path) -> Path:
    """A file of MAE's `submitit_pretrain.py`, whose command line holds paths."""
    arguments = argparse.Namespace(output_dir=pathlib.PosixPath("/checkpoint/experiments/7"), other=WindowsPath())
    torch.save({"model": encoder_of(vit), "epoch": 799, "args": arguments}, path / "checkpoint-799.pth")
    return path / "checkpoint-799.pth"


def mae_released(vit: Any, path: Path) -> Path:
    torch.save({"model": encoder_of(vit)}, path / "mae_pretrain.pth")
    return path / "mae_pretrain.pth"


def moco(vit: Any, path: Path) -> Path:
    tensors = {f"module.base_encoder.{name}": t for name, t in encoder_of(vit).items()}
    tensors |= {f"module.base_encoder.head.{name}": t for name, t in mlp(3, 16, 32, 8).state_dict().items()}
    tensors |= {f"module.momentum_encoder.{name}": t + 1 for name, t in encoder_of(vit).items()}
    tensors |= {f"module.predictor.{name}": t for name, t in mlp(2, 8, 32, 8).state_dict().items()}
    state = {"epoch": 300, "arch": "vit_base", "state_dict": tensors, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(state, path / "vit-b-300ep.pth.tar")
    return path / "vit-b-300ep.pth.tar"


def lgp_10_percent(vit: Any, path: Path) -> Path:
    """A file of LGP's fine-tuning with `tuneFromFirstFC`: two layers of a classifier."""
    head = {"head.0.weight": torch.ones(32, 16), "head.1.weight": torch.ones(10, 32), "head.1.bias": torch.ones(10)}
    torch.save({"model": encoder_of(vit) | head, "epoch": 99}, path / "checkpoint-best.pth")
    return path / "checkpoint-best.pth"


def lgp_linear(vit: Any, path: Path) -> Path:
    """A file of LGP's linear probe: the encoder apart from the classifiers."""
    heads = {"0.module.linear.weight": torch.ones(10, 16), "0.module.linear.bias": torch.ones(10)}
    torch.save({"epoch": 90, "backbone_state_dict": encoder_of(vit), "state_dict": heads}, path / "model_best.pth.tar")
    return path / "model_best.pth.tar"


def mae_linear(vit: Any, path: Path) -> Path:
    """A file of MAE's linear probe: BatchNorm and a layer."""
    head = {"head.0.running_mean": torch.ones(16), "head.0.num_batches_tracked": torch.tensor(7)}
    torch.save({"model": encoder_of(vit) | head | {"head.1.bias": torch.ones(10)}}, path / "linear.pth")
    return path / "linear.pth"


def timm_weights(vit: Any, path: Path) -> Path:
    torch.save(vit.state_dict(), path / "timm.pth")
    return path / "timm.pth"


def timm_training(vit: Any, path: Path) -> Path:
    torch.save({"epoch": 3, "arch": "vit", "state_dict": vit.state_dict()}, path / "last.pth.tar")
    return path / "last.pth.tar"


def safetensors(vit: Any, path: Path) -> Path:
    save_file(encoder_of(vit), path / "model.safetensors")
    return path / "model.safetensors"


LAYOUTS = {
    mae_pretraining: "MAE",
    mae_multi_node: "MAE",
    mae_released: "MAE",
    mae_linear: "MAE",
    lgp_10_percent: "MAE",
    lgp_linear: "LGP (linear probe)",
    moco: "MoCo v3 / LGP",
    timm_weights: "timm or lgp",
    timm_training: "timm (in a training checkpoint)",
    safetensors: "timm or lgp",
}


@pytest.mark.parametrize(("write", "layout"), LAYOUTS.items())
def test_every_layout_gives_the_same_features(
    write: Callable[[Any, Path], Path], layout: str, vit: Any, params: Params, tmp_path: Path
) -> None:
    imported = read(write(vit, tmp_path), params)
    assert imported.layout == layout
    images = torch.randn(5, 1, 8, 8)
    vit.reset_classifier(0)
    with torch.inference_mode():
        assert torch.allclose(imported.encoder.eval()(images), vit(images), atol=1e-6)
    assert {u.target for u in imported.uses if u.how == "encoder"} == set(encoder_of(vit))


def test_what_is_left_out_is_said(vit: Any, params: Params, tmp_path: Path) -> None:
    uses = {u.name: u for u in read(moco(vit, tmp_path), params).uses}
    assert uses["module.momentum_encoder.cls_token"].how == "momentum encoder"
    assert uses["module.predictor.0.weight"].how == "predictor"
    assert uses["module.base_encoder.head.0.weight"].target == "projector.0.weight"
    uses = {u.name: u for u in read(mae_pretraining(vit, tmp_path), params).uses}
    assert {uses["mask_token"].how, uses["decoder_pred.weight"].how} == {"decoder"}
    uses = {u.name: u for u in read(timm_weights(vit, tmp_path), params).uses}
    assert uses["head.weight"].how == "classifier"
    uses = {u.name: u for u in read(lgp_10_percent(vit, tmp_path), params).uses}
    assert {uses["head.0.weight"].how, uses["head.1.weight"].how} == {"classifier"}


def changed(vit: Any, path: Path, change: Callable[[Tensors], None]) -> Path:
    tensors = encoder_of(vit)
    change(tensors)
    torch.save({"model": tensors}, path / "changed.pth")
    return path / "changed.pth"


FAULTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop("blocks.1.mlp.fc1.bias"), r"blocks\.1\.mlp\.fc1\.bias is missing"),
    "misshapen": (
        lambda t: t.update({"norm.weight": torch.ones(17)}),
        r"norm\.weight is \(17,\) where \(16,\) is needed",
    ),
    "surplus": (
        lambda t: t.update({"blocks.3.norm1.weight": torch.ones(16)}),
        r"blocks\.3\.norm1\.weight has no place in the encoder",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensor_that_does_not_fit_is_refused_by_name_unless_told(
    fault: str, vit: Any, params: Params, tmp_path: Path
) -> None:
    change, message = FAULTS[fault]
    path = changed(vit, tmp_path, change)
    with pytest.raises(LgpError, match=message):
        read(path, params)
    encoder = read(path, params, partial=True).encoder
    assert torch.equal(encoder.cls_token, vit.cls_token)


def test_dimensions_of_the_file_are_said(vit: Any, params: Params, values: Any, tmp_path: Path) -> None:
    other = Params.model_validate(merged(values, {"model": {"width": 32}}))
    with pytest.raises(LgpError, match="The file holds a ViT of width 16, depth 3, patch 2, 1 channels"):
        read(timm_weights(vit, tmp_path), other)


@pytest.mark.parametrize(("size", "grid"), [(16, 8), (4, 2)])
def test_positions_of_another_grid_are_interpolated_as_officially(
    size: int, grid: int, vit: Any, params: Params, values: Any, tmp_path: Path
) -> None:
    other = Params.model_validate(merged(values, {"data": {"image_size": size}}))
    imported = read(timm_weights(vit, tmp_path), other)
    how = next(u for u in imported.uses if u.name == "pos_embed").how
    assert how == f"interpolated from 4×4 to {grid}×{grid} patches"
    positions: Tensor = imported.encoder.pos_embed
    assert torch.equal(positions[:, 0], vit.pos_embed[:, 0])
    before = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    official = torch.nn.functional.interpolate(before, (grid, grid), mode="bicubic", align_corners=False)
    assert torch.allclose(positions[:, 1:], official.permute(0, 2, 3, 1).flatten(1, 2), atol=1e-6)


TIMM = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]}
HALF = Normalization((0.5, 0.5, 0.5), (0.25, 0.5, 0.5))


@pytest.fixture
def colour(values: Any) -> Params:
    return Params.model_validate(merged(values, {"data": {"channels": 3}}))


def colour_vit(colour: Params) -> Any:
    return timm.create_model(ARCHITECTURE, num_classes=10, **model_args(colour.model, colour.data))


@pytest.mark.parametrize("write", [mae_released, lgp_10_percent, moco, lgp_linear])
def test_normalization_is_imagenets_in_the_layouts_that_have_no_other(
    write: Callable[[Any, Path], Path], colour: Params, tmp_path: Path
) -> None:
    imported = import_checkpoint(write(colour_vit(colour), tmp_path), colour.model, colour.data)
    assert imported.normalization == IMAGENET == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert imported.normalization_from == f"the code of {imported.layout}"


@pytest.mark.parametrize("config", [{"pretrained_cfg": TIMM}, TIMM])
@pytest.mark.parametrize("write", [timm_weights, timm_training, mae_released])
def test_normalization_beside_the_file_goes_before_that_of_the_layout(
    write: Callable[[Any, Path], Path], config: Any, colour: Params, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    imported = import_checkpoint(write(colour_vit(colour), tmp_path), colour.model, colour.data)
    assert imported.normalization == HALF
    assert imported.normalization_from == str(tmp_path / "config.json")


def test_normalization_of_the_command_goes_before_all(colour: Params, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": TIMM}))
    path, given = mae_released(colour_vit(colour), tmp_path), Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    imported = import_checkpoint(path, colour.model, colour.data, normalization=given)
    assert (imported.normalization, imported.normalization_from) == (given, "the command")


@pytest.mark.parametrize("write", [timm_weights, timm_training])
def test_unknown_normalization_is_asked_for(write: Callable[[Any, Path], Path], colour: Params, tmp_path: Path) -> None:
    path = write(colour_vit(colour), tmp_path)
    with pytest.raises(LgpError, match=r"one value a channel, e\.g\. --mean 0\.485,0\.456,0\.406 --std 0\.229"):
        import_checkpoint(path, colour.model, colour.data)


def test_normalization_of_other_channels_is_refused(vit: Any, params: Params, tmp_path: Path) -> None:
    with pytest.raises(
        LgpError, match=r"from the code of MAE\) is of 3 channels, data\.channels is 1: .* --mean and --std"
    ):
        import_checkpoint(mae_released(vit, tmp_path), params.model, params.data)


@pytest.mark.parametrize("text", ["", "[]{", "7"])
def test_damaged_configuration_beside_the_file_is_one_line(text: str, vit: Any, params: Params, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LgpError, match=r"config\.json beside the checkpoint is damaged"):
        read(safetensors(vit, tmp_path), params)


def test_heads_are_checked_with_the_configuration_beside_the_file(vit: Any, params: Params, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 4}}')
    with pytest.raises(LgpError, match=r"says 4 heads, model\.heads is 2: set `model` to the file's encoder"):
        read(safetensors(vit, tmp_path), params)


def test_weights_that_are_not_finite_are_refused(vit: Any, params: Params, tmp_path: Path) -> None:
    path = changed(vit, tmp_path, lambda t: t["norm.bias"].fill_(float("nan")))
    with pytest.raises(LgpError, match=r"norm\.bias holds values that are not finite"):
        read(path, params)


class Malicious:
    """What a pickle can hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code of a stranger",))


def test_pickle_with_code_is_refused_and_not_run(
    params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {"cls_token": torch.zeros(1)}, "extra": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(LgpError, match=r"holds more than tensors .*would run code from the file: refused"):
        read(tmp_path / "bad.pth", params)
    assert "stranger" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"), [("a.pth", b"no pickle"), ("a.safetensors", b"{}"), ("b.pth", b""), ("c.pth", b"\x80\x02M")]
)
def test_damaged_file_is_one_line(name: str, content: bytes, params: Params, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LgpError, match=r"cannot be read as a checkpoint|is empty|is no checkpoint"):
        read(tmp_path / name, params)


def test_unknown_layout_lists_the_known(params: Params, tmp_path: Path) -> None:
    torch.save({"backbone.layer1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(LgpError, match=r"its keys begin with backbone\.layer1\.weight\): expected a ViT of MoCo v3"):
        read(tmp_path / "resnet.pth", params)


def test_export_comes_back_the_same_and_brings_the_decoder(vit: Any, params: Params, tmp_path: Path) -> None:
    heads = {n: t for n, t in MAE(vit, 0.75, 16, 1, 2).state_dict().items() if not n.startswith("encoder.")}
    projector = {"projector.0.weight": torch.zeros(1)}
    export_checkpoint(encoder_of(vit), heads | projector, FOREIGN, tmp_path / "out.pth")
    model = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert set(model) == set(encoder_of(vit)) | set(heads)
    imported = import_checkpoint(tmp_path / "out.pth", params.model, params.data)
    assert (imported.normalization, imported.normalization_from) == (FOREIGN, str(tmp_path / "out.pth"))
    assert all(torch.equal(t, encoder_of(vit)[n]) for n, t in imported.encoder.state_dict().items())


def test_partial_import_says_what_makes_it_another_encoder(vit: Any, params: Params, tmp_path: Path) -> None:
    tensors = encoder_of(vit) | {f"blocks.{block}.more": torch.zeros(2) for block in range(3)}
    del tensors["norm.bias"]
    torch.save({"model": tensors}, tmp_path / "other.pth")
    faults = read(tmp_path / "other.pth", params, partial=True).faults
    assert faults == [
        *(f"blocks.{block}.more has no place in the encoder" for block in range(3)),
        "norm.bias is missing",
    ]
    assert few_faults(faults + faults).endswith("norm.bias is missing; and 4 more")
    torch.save({"model": encoder_of(vit)}, tmp_path / "mae.pth")
    assert read(tmp_path / "mae.pth", params, partial=True).faults == []


@pytest.mark.parametrize("name", ["blocks.1.ls1.gamma", "blocks.0.gamma_2", "reg_token", "norm_pre.weight"])
def test_partial_import_leaves_out_no_part_that_makes_an_encoder(
    name: str, vit: Any, params: Params, tmp_path: Path
) -> None:
    torch.save({"model": encoder_of(vit) | {name: torch.full((16,), 1e-5)}}, tmp_path / "other.pth")
    with pytest.raises(LgpError, match=rf"{name} has no place .*; --partial needs all tokens, positions and scales"):
        read(tmp_path / "other.pth", params, partial=True)


def test_partial_import_leaves_out_no_positions(vit: Any, params: Params, tmp_path: Path) -> None:
    torch.save({"model": encoder_of(vit) | {"pos_embed": torch.zeros(1, 8, 16)}}, tmp_path / "other.pth")
    with pytest.raises(LgpError, match=r"pos_embed is \(1, 8, 16\) where .*--partial needs all tokens"):
        read(tmp_path / "other.pth", params, partial=True)
