"""Encoders of timm, written here in the layouts in which other projects publish theirs, come in with equal features."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import merged
from safetensors.torch import save_file
from torch import Tensor

from lgp.errors import LgpError
from lgp.models.interchange import Imported, import_checkpoint
from lgp.models.layouts import CLIP, IMAGENET, model_of
from lgp.params.file import Params

Tensors = dict[str, Tensor]


def vit_of(name: str, grid: int = 3, **changes: Any) -> Any:
    """Make a ViT of timm of random weights, for images of `grid` patches a side."""
    patch = 14 if "patch14" in name else 16
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=0, img_size=grid * patch, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def dinov2(model: Any, path: Path) -> Path:
    """Write `dinov2_vits14_pretrain.pth`, or its kind with registers, whose positions include the class token's."""
    tensors = dict(model.state_dict())
    if model.reg_token is not None:
        of_class = torch.randn(1, 1, model.embed_dim)
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["cls_token"] = tensors["cls_token"] - of_class
        tensors["pos_embed"] = torch.cat([of_class, tensors["pos_embed"]], dim=1)
    torch.save(tensors | {"mask_token": torch.zeros(1, model.embed_dim)}, path / "dinov2.pth")
    return path / "dinov2.pth"


CLIP_NAMES = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def clip(model: Any, path: Path) -> Path:
    """Write what the state_dict of CLIP has: both towers, the projection, and numbers."""
    tensors: Tensors = {"visual.proj": torch.randn(model.embed_dim, 32), "input_resolution": torch.tensor(224)}
    tensors |= {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.tensor(4.6)}
    for name, tensor in model.state_dict().items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            for timms, theirs in CLIP_NAMES.items():
                rest = rest.replace(timms, theirs)
            tensors[f"visual.transformer.resblocks.{block}.{rest}"] = tensor
        elif name == "cls_token":
            tensors["visual.class_embedding"] = tensor[0, 0]
        elif name == "pos_embed":
            tensors["visual.positional_embedding"] = tensor[0]
        else:
            tensors[
                "visual."
                + name.replace("norm_pre", "ln_pre").replace("norm.", "ln_post.").replace("patch_embed.proj", "conv1")
            ] = tensor
    torch.save(tensors, path / "clip.pt")
    return path / "clip.pt"


def hugging_face(model: Any, path: Path, prefix: str = "vit.") -> Path:
    """Write the folder of `ViTMAEForPreTraining`."""
    tensors: Tensors = {"decoder.mask_token": torch.zeros(1, 1, 8)} if prefix else {}
    whole = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    parts |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for name, tensor in model.state_dict().items():
        kind = name.rpartition(".")[2]
        if ".qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                block = name.split(".")[1]
                tensors[f"{prefix}encoder.layer.{block}.attention.attention.{part}.{kind}"] = third.contiguous()
        elif name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            tensors[f"{prefix}encoder.layer.{block}.{parts[rest.rpartition('.')[0]]}.{kind}"] = tensor
        elif name.startswith("patch_embed"):
            tensors[f"{prefix}embeddings.patch_embeddings.projection.{kind}"] = tensor
        else:
            tensors[prefix + whole.get(name, f"layernorm.{kind}")] = tensor
    save_file(tensors, path / "model.safetensors")
    heads = model.blocks[0].attn.num_heads
    (path / "config.json").write_text(json.dumps({"model_type": "vit_mae", "num_attention_heads": heads}))
    statistics = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 0.5]}
    (path / "preprocessor_config.json").write_text(json.dumps(statistics))
    return path


def timms(model: Any, path: Path) -> Path:
    """Write the folder of timm on the hub."""
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    return path


PUBLISHED = [
    ("vit_small_patch14_dinov2", dinov2, "DINOv2"),
    ("vit_small_patch14_reg4_dinov2", dinov2, "DINOv2"),
    ("vit_small_patch14_dinov2", timms, "timm or lgp"),
    ("vit_xsmall_patch16_clip_224", clip, "CLIP"),
    ("test_vit2", timms, "timm or lgp"),
    ("test_vit3", timms, "timm or lgp"),
]


def params_for(values: dict[str, Any], model: dict[str, Any], size: int) -> Params:
    return Params.model_validate(
        merged(
            {**values, "model": {}},
            {
                "data": {"channels": 3, "image_size": size},
                "model": model,
                "graft": {"stage_lr": {"base_lrs": [1e-4]}},
                "reverse": {"base_lrs": [1e-4]},
            },
        )
    )


def read(path: Path, params: Params, partial: bool = False) -> Imported:
    return import_checkpoint(path, params.model, params.data, partial)


@pytest.mark.parametrize(("name", "write", "layout"), PUBLISHED, ids=lambda value: getattr(value, "__name__", value))
def test_features_are_those_of_timm(
    name: str, write: Callable[[Any, Path], Path], layout: str, values: dict[str, Any], tmp_path: Path
) -> None:
    # without the pooling by attention, whose place the average takes
    own = {"global_pool": "avg", "fc_norm": False, "pool_include_prefix": False} if name == "test_vit3" else {}
    vit = vit_of(name, **own)
    size = vit.patch_embed.img_size[0]
    imported = read(write(vit, tmp_path), params_for(values, {"timm": name}, size))
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        assert torch.allclose(imported.encoder.eval()(images), vit(images), atol=1e-5)
    assert (imported.layout, imported.faults, imported.heads_from) == (layout, [], name)
    assert {use.target for use in imported.uses} - {None} == vit.state_dict().keys()
    known = {"DINOv2": IMAGENET, "CLIP": CLIP}.get(layout, imported.normalization)
    assert imported.normalization == known


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_folder_of_hugging_face_gives_timms_features(prefix: str, values: dict[str, Any], tmp_path: Path) -> None:
    vit = vit_of("vit_tiny_patch16_224")
    folder = hugging_face(vit, tmp_path, prefix)
    assert model_of(folder) == {"timm": None, "patch_size": 16, "width": 192, "depth": 12, "heads": 3}
    imported = read(folder, params_for(values, {"patch_size": 16, "width": 192, "depth": 12, "heads": 3}, 48))
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        assert torch.allclose(imported.encoder.eval()(images), vit(images), atol=1e-5)
    assert imported.normalization.std == (0.25, 0.5, 0.5)
    assert imported.normalization_from.endswith("preprocessor_config.json")
    left_out = {use.name: use.how for use in imported.uses if use.target is None}
    assert left_out == ({"decoder.mask_token": "decoder"} if prefix else {})
    of_qkv = next(use.name for use in imported.uses if use.target == "blocks.0.attn.qkv.bias")
    assert of_qkv.split(" + ") == [
        f"{prefix}encoder.layer.0.attention.attention.{p}.bias" for p in ("query", "key", "value")
    ]


@pytest.mark.parametrize(("name", "write"), [(name, write) for name, write, _ in PUBLISHED[:4]])
def test_positions_of_another_size_are_interpolated_as_timm_does(
    name: str, write: Callable[[Any, Path], Path], values: dict[str, Any], tmp_path: Path
) -> None:
    vit = vit_of(name)
    patch = vit.patch_embed.patch_size[0]
    imported = read(write(vit, tmp_path), params_for(values, {"timm": name}, 2 * patch))
    how = next(use.how for use in imported.uses if use.target == "pos_embed")
    assert how == "interpolated from 3×3 to 2×2 patches"
    positions = imported.encoder.pos_embed
    prefix = positions.shape[1] - 4
    assert torch.equal(positions[:, :prefix], vit.pos_embed[:, :prefix])
    vit.set_input_size(img_size=(2 * patch, 2 * patch))
    images = torch.randn(2, 3, 2 * patch, 2 * patch)
    with torch.inference_mode():
        assert torch.allclose(imported.encoder.eval()(images), vit(images), atol=1e-5)


def test_what_clip_has_beside_its_encoder_is_accounted_for(values: dict[str, Any], tmp_path: Path) -> None:
    vit = vit_of("vit_xsmall_patch16_clip_224")
    uses = read(clip(vit, tmp_path), params_for(values, {"timm": "vit_xsmall_patch16_clip_224"}, 48)).uses
    how = {use.name: use.how for use in uses}
    assert (how["logit_scale"], how["input_resolution"], how["visual.proj"]) == (
        "text tower",
        "text tower",
        "classifier",
    )
    assert how["visual.class_embedding"] == "encoder"


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_scales_and_registers_are_never_left_out(
    name: str, partial: bool, values: dict[str, Any], tmp_path: Path
) -> None:
    plain = params_for(values, {"patch_size": 14, "width": 384, "depth": 12, "heads": 6}, 42)
    with pytest.raises(LgpError, match=r"has no place in the encoder.*--write"):
        read(dinov2(vit_of(name), tmp_path), plain, partial)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("vit_small_patch14_dinov2", dinov2),
        ("vit_small_patch14_reg4_dinov2", dinov2),
        ("vit_xsmall_patch16_clip_224", clip),
    ],
)
def test_file_tells_the_name(name: str, write: Callable[[Any, Path], Path], tmp_path: Path) -> None:
    assert model_of(write(vit_of(name), tmp_path))["timm"] == name


def test_file_that_several_vits_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"vit_base_patch16_{name}224" for name in ("", "clip_", "clip_quickgelu_")]
    monkeypatch.setattr(timm, "list_models", lambda *_, **__: names)
    file = clip(vit_of("vit_base_patch16_clip_224"), tmp_path)
    with pytest.raises(LgpError, match=r"several .*vit_base_patch16_clip_224.*quickgelu.*set model\.timm yourself"):
        model_of(file)


def test_file_that_fits_names_of_several_sizes_takes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"vit_base_patch16_siglip_{size}" for size in ("224", "256", "gap_224")]
    monkeypatch.setattr(timm, "list_models", lambda *_, **__: names)
    assert model_of(timms(vit_of("vit_base_patch16_siglip_224"), tmp_path))["timm"] == names[0]


def test_file_with_a_projector_tells_its_numbers(tmp_path: Path) -> None:
    vit = vit_of("vit_small_patch16_224", depth=2)
    tensors = {f"module.base_encoder.{name}": tensor for name, tensor in vit.state_dict().items()}
    tensors |= {"module.base_encoder.head.0.weight": torch.ones(8, 384), "module.predictor.0.weight": torch.ones(8, 8)}
    torch.save({"state_dict": tensors}, tmp_path / "vit-s.pth.tar")
    # heads of MoCo v3's ViT-S, not of timm's
    assert model_of(tmp_path / "vit-s.pth.tar") == {
        "timm": None,
        "patch_size": 16,
        "width": 384,
        "depth": 2,
        "heads": 12,
    }


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny", "vit_small_patch16_dinov3", "test_vit", 7, "x"])
def test_name_beside_the_file_that_is_of_another_model_is_one_line(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm, "list_models", lambda *_, **__: ["test_vit"])
    folder = timms(vit_of("test_vit2"), tmp_path)
    (folder / "config.json").write_text(json.dumps({"architecture": name}))
    with pytest.raises(LgpError, match=r"no plain ViT of timm|several ViTs"):
        model_of(folder)


def test_name_beside_the_file_is_compared(values: dict[str, Any], tmp_path: Path) -> None:
    folder = timms(vit_of("vit_small_patch14_dinov2"), tmp_path)
    cfg = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "vit_small_patch14_dinov2.lvd142m", "pretrained_cfg": cfg})
    )
    assert model_of(folder)["timm"] == "vit_small_patch14_dinov2"
    assert read(folder, params_for(values, {"timm": "vit_small_patch14_dinov2"}, 42)).faults == []
    with pytest.raises(LgpError, match=r"is a vit_small_patch14_dinov2, model\.timm is vit_small_patch16_224"):
        read(folder, params_for(values, {"timm": "vit_small_patch16_224"}, 48))


def test_heads_of_a_name_are_compared_too(values: dict[str, Any], tmp_path: Path) -> None:
    vit = vit_of("vit_small_patch16_224")
    tensors = {f"module.base_encoder.{name}": tensor for name, tensor in vit.state_dict().items()}
    torch.save({"state_dict": tensors}, tmp_path / "vit-s.pth.tar")
    with pytest.raises(LgpError, match=r"MoCo v3 / LGP says 12 heads, vit_small_patch16_224 has 6"):
        read(tmp_path / "vit-s.pth.tar", params_for(values, {"timm": "vit_small_patch16_224"}, 48))


@pytest.mark.parametrize("missing", ["reg_token", "blocks.0.ls1.gamma", "pos_embed", "cls_token"])
def test_missing_parts_that_make_an_encoder_are_refused(missing: str, values: dict[str, Any], tmp_path: Path) -> None:
    tensors = vit_of("vit_small_patch14_reg4_dinov2").state_dict()
    del tensors[missing]
    torch.save(tensors, tmp_path / "timm.pth")
    with pytest.raises(LgpError, match=rf"{missing} is missing.*--partial needs all tokens, positions and scales"):
        read(tmp_path / "timm.pth", params_for(values, {"timm": "vit_small_patch14_reg4_dinov2"}, 42), partial=True)


def rotary(tensors: Tensors) -> None:
    tensors["rope_embed.periods"] = torch.ones(16)
    del tensors["pos_embed"]


DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no positions": (lambda t: t.pop("pos_embed"), "it lacks positions"),
    "no patches": (lambda t: t.pop("patch_embed.proj.weight"), r"it lacks .* or patches"),
    "rotary": (rotary, r"has rotary positions \(rope_embed\.periods\), as DINOv3 and EVA-02: that is no plain ViT"),
    "flat": (lambda t: t.update({"patch_embed.proj.weight": torch.ones(384, 588)}), "are of no ViT"),
    "oblong": (lambda t: t.update({"patch_embed.proj.weight": torch.ones(384, 3, 7, 14)}), "are of no ViT"),
    "empty": (lambda t: t.update({"patch_embed.proj.weight": torch.ones(384, 3, 0, 0)}), "are of no ViT"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_dinov2_is_one_line(damage: str, tmp_path: Path) -> None:
    tensors = torch.load(dinov2(vit_of("vit_small_patch14_dinov2", depth=1), tmp_path))
    change, said = DAMAGES[damage]
    change(tensors)
    torch.save(tensors, tmp_path / "dinov2.pth")
    with pytest.raises(LgpError, match=rf"dinov2\.pth \(DINOv2\): .*{said}"):
        model_of(tmp_path / "dinov2.pth")


def test_hugging_faces_other_activation_is_refused(tmp_path: Path) -> None:
    folder = hugging_face(vit_of("vit_tiny_patch16_224"), tmp_path)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 3, "hidden_act": "relu"}))
    with pytest.raises(LgpError, match="has the activation relu: only gelu is taken"):
        model_of(folder)


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = hugging_face(vit_of("vit_tiny_patch16_224"), tmp_path)
    save_file(
        load_file(folder / "model.safetensors") | {"layernorm.weight": torch.ones(192)}, folder / "model.safetensors"
    )
    with pytest.raises(LgpError, match=r"are one tensor of timm, norm\.weight"):
        model_of(folder)


def test_tensors_that_share_memory_keep_their_names(values: dict[str, Any], tmp_path: Path) -> None:
    vit = vit_of("vit_small_patch14_dinov2")
    tensors = dict(vit.state_dict())
    flat = torch.cat([tensors["norm.weight"], tensors["norm.bias"]])
    tensors |= {"norm.weight": flat[:384], "norm.bias": flat[384:], "mask_token": flat[:384].view(1, 384)}
    torch.save(tensors, tmp_path / "dinov2.pth")
    uses = read(tmp_path / "dinov2.pth", params_for(values, {"timm": "vit_small_patch14_dinov2"}, 42)).uses
    assert {use.target: use.name for use in uses if use.target}["norm.bias"] == "norm.bias"


def test_file_of_no_vit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "list_models", lambda *_, **__: ["test_vit", "vit_tiny_patch16_224"])
    tensors = vit_of("test_vit").state_dict() | {"blocks.0.more.weight": torch.zeros(2)}
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(LgpError, match=r"no plain ViT of timm .* has the tensors .*width 64, depth 6, patch 16, 3 "):
        model_of(tmp_path / "other.pth")


def test_heads_that_a_published_size_does_not_have_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    vit = vit_of("vit_base_patch16_224", depth=1)
    torch.save({"model": vit.state_dict()}, tmp_path / "mae.pth")
    model = {"patch_size": 16, "width": 768, "depth": 1, "heads": 4}
    with pytest.raises(LgpError, match=r"the ViT of width 768 of MAE says 12 heads, model\.heads is 4: set `model`"):
        read(tmp_path / "mae.pth", params_for(values, model, 48))
    (tmp_path / "config.json").write_text('{"model_args": {"num_heads": 4}}')
    assert read(tmp_path / "mae.pth", params_for(values, model, 48)).heads_from == str(tmp_path / "config.json")


@pytest.mark.parametrize("change", ["cut", "none", "not_square", "sparse", "text"])
def test_damaged_file_of_another_layout_is_one_line(change: str, values: dict[str, Any], tmp_path: Path) -> None:
    tensors = torch.load(clip(vit_of("vit_xsmall_patch16_clip_224"), tmp_path))
    key = "visual.positional_embedding"
    other: dict[str, Any] = {
        "cut": tensors[key][:, :5].clone(),
        "not_square": tensors[key][:7].clone(),
        "sparse": tensors[key].to_sparse(),
        "text": "positions",
    }
    tensors = {k: v for k, v in tensors.items() if k != key} | ({key: other[change]} if change in other else {})
    torch.save(tensors, tmp_path / "clip.pt")
    with pytest.raises(LgpError) as error:
        read(tmp_path / "clip.pt", params_for(values, {"timm": "vit_xsmall_patch16_clip_224"}, 48))
    assert "clip.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_of_hugging_face_with_a_part_missing_is_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = hugging_face(vit_of("vit_tiny_patch16_224"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["vit.encoder.layer.3.attention.attention.key.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LgpError, match="are not the queries, keys and values of one block"):
        model_of(folder)


def test_what_timm_fetches_is_imported(monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> None:
    vit, asked = vit_of("test_vit2"), []
    create = timm.create_model

    def fetching(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        if pretrained:
            asked.append(name)
        return vit if pretrained else create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", fetching)
    imported = read(Path("timm:test_vit2.r160_in1k"), params_for(values, {"timm": "test_vit2"}, 48))
    assert asked == ["test_vit2.r160_in1k"]
    images = torch.randn(2, 3, 48, 48)
    with torch.inference_mode():
        assert torch.allclose(imported.encoder.eval()(images), vit(images), atol=1e-5)
    assert imported.normalization.mean == vit.pretrained_cfg["mean"]
    assert model_of(Path("hf-hub:some/where")) == {
        "timm": "test_vit2",
        "patch_size": 16,
        "width": 64,
        "depth": 8,
        "heads": 2,
    }
    assert asked[-2:].count("hf-hub:some/where") + asked.count("hf-hub:some/where") > 0


def test_without_a_network_fetching_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LgpError, match=r"timm:test_vit2 cannot be fetched .*fetch the file elsewhere"):
        model_of(Path("timm:test_vit2"))
