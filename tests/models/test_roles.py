"""What each model says of its parameters, against a reading of their names."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lgp.models.contrastive import build_contrastive
from lgp.models.heads_file import load_first_fc, load_heads, save_heads
from lgp.models.joint import Joint
from lgp.models.mae import MAE
from lgp.models.moco import MoCo
from lgp.models.roles import PretrainingModel, Role, encoder_roles
from lgp.models.vit import build_encoder
from lgp.params.file import Params
from lgp.pretrain.mim import build_mae

DEPTH = 3  # of the small parameters
HIDDEN, WIDTH = 32, 16


def mae(params: Params) -> PretrainingModel:
    return build_mae(build_encoder(params.model, params.data), params.mim)


def contrastive(objective: str) -> Callable[[Params], PretrainingModel]:
    def build(params: Params) -> PretrainingModel:
        of_objective = params.contrastive.model_copy(update={"objective": objective})
        return build_contrastive(build_encoder(params.model, params.data), of_objective)

    return build


def joint(params: Params) -> PretrainingModel:
    encoder = build_encoder(params.model, params.data)
    return Joint(build_contrastive(encoder, params.contrastive), build_mae(encoder, params.mim))


MODELS: dict[str, Callable[[Params], PretrainingModel]] = {
    "mae": mae,
    "mocov3": contrastive("mocov3"),
    "simclr": contrastive("simclr"),
    "vicreg": contrastive("vicreg"),
    "swav": contrastive("swav"),
    "refine": contrastive("refine"),
    "joint": joint,
}


def role_by_name(name: str) -> Role:
    """Tell a role from a name, as only a test may."""
    encoder = r"(?P<before>(?:contrastive\.|mae\.)?)(?P<copy>momentum_|averaged_)?encoder\.(?P<rest>.*)"
    found = re.fullmatch(encoder, name)
    if found is None:
        followed = re.fullmatch(r"(?P<before>(?:contrastive\.)?)momentum_(?P<rest>projector\..*)", name)
        if followed is None:
            return Role("heads", DEPTH + 1)
        return Role("momentum_projector", DEPTH + 1, followed["before"] + followed["rest"])
    block = re.match(r"blocks\.(\d+)\.", found["rest"])
    if block is not None:
        part, layer = f"block{block[1]}", 1 + int(block[1])
    else:
        part, layer = ("norm", DEPTH + 1) if found["rest"].startswith("norm.") else ("embed", 0)
    if found["copy"] is None:
        return Role(part, layer)
    return Role(f"{found['copy']}encoder", layer, f"{found['before']}encoder.{found['rest']}")


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_its_role(name: str, params: Params) -> None:
    model = MODELS[name](params)
    names = [n for n, _ in model.named_parameters()]
    assert model.roles() == {n: role_by_name(n) for n in names}
    assert list(model.roles()) == names
    parts = {"embed", "block0", "block1", "block2", "norm", "heads"}
    copies = {"momentum_encoder", "momentum_projector"} if name in ("mocov3", "joint") else set()
    copies |= {"averaged_encoder"} if name == "refine" else set()
    assert {role.part for role in model.roles().values()} == parts | copies


@pytest.mark.parametrize("name", ["mocov3", "joint"])
def test_a_momentum_copy_follows_the_parameter_that_it_is_a_copy_of(name: str, params: Params) -> None:
    model = MODELS[name](params)
    copied = {n: role.follows for n, role in model.roles().items() if role.follows is not None}
    contrast = model.contrastive if isinstance(model, Joint) else model
    assert isinstance(contrast, MoCo)
    keys = [*contrast.momentum_encoder.parameters(), *contrast.momentum_projector.parameters()]
    assert {id(model.get_parameter(n)) for n in copied} == {id(k) for k in keys}
    with torch.no_grad():
        for number, parameter in enumerate(p for n, p in model.named_parameters() if n not in copied):
            parameter.fill_(number)
        contrast.update_momentum_encoder(0.0)
    for copy, learner in copied.items():
        assert torch.equal(model.get_parameter(copy), model.get_parameter(learner)), copy


@pytest.mark.parametrize("name", MODELS)
def test_encoder_is_one_module_with_its_own_roles(name: str, params: Params) -> None:
    model = MODELS[name](params)
    of_encoder, of_model = encoder_roles(model.encoder), model.roles()
    assert of_encoder.keys() == dict(model.encoder.named_parameters()).keys()
    names = {id(p): n for n, p in model.named_parameters()}
    assert {n: of_model[names[id(p)]] for n, p in model.encoder.named_parameters()} == of_encoder


def test_roles_of_an_encoder_do_not_go_by_names_alone(params: Params) -> None:
    """Block 10 of twelve is not block 1, and a norm inside a block is not the final one."""
    deep = params.model.model_copy(update={"depth": 12})
    roles = encoder_roles(build_encoder(deep, params.data))
    assert roles["blocks.10.norm1.weight"] == Role("block10", 11)
    assert roles["blocks.1.norm1.weight"] == Role("block1", 2)
    assert roles["norm.bias"] == Role("norm", 13)
    embeddings = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {n for n, role in roles.items() if role == Role("embed", 0)} == embeddings


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_all_but_encoder_and_momentum_copies(name: str, params: Params) -> None:
    model, state = MODELS[name](params), MODELS[name](params).state_dict()
    inside = re.compile(
        r"(contrastive\.|mae\.)?(momentum_|averaged_)?encoder\.|(contrastive\.)?momentum_projector\.|.*\.queue\."
    )
    heads = model.heads()
    assert set(heads) == {n for n in state if not inside.match(n)}
    assert all(torch.equal(tensor, model.state_dict()[n]) for n, tensor in heads.items())
    assert not any(tensor.requires_grad for tensor in heads.values())
    if name == "mae":
        assert {"mask_token", "decoder_pos_embed", "decoder_pred.weight"} <= heads.keys()
    else:
        before = {"joint": "contrastive.", "refine": "block_heads.0."}.get(name, "")
        norm = {f"{before}projector.1.{of}" for of in ("running_mean", "running_var", "num_batches_tracked")}
        assert norm <= heads.keys()


FIRST_FC = {
    "mae": None,
    "mocov3": "projector.0.weight",
    "simclr": "projector.0.weight",
    "vicreg": "projector.0.weight",
    "swav": "projector.0.weight",
    "refine": "block_heads.0.projector.0.weight",
    "joint": "contrastive.projector.0.weight",
}


@pytest.mark.parametrize("name", MODELS)
def test_first_layer_of_the_projector_is_named(name: str, params: Params) -> None:
    model = MODELS[name](params)
    first = model.first_fc()
    assert first == FIRST_FC[name]
    if first is not None:
        assert model.heads()[first].shape == (HIDDEN, WIDTH)
        seen: list[nn.Module] = []
        for n, module in model.named_modules():
            if n in ("projector", "contrastive.projector", "block_heads.0.projector"):
                layers = [m for m in module if isinstance(m, nn.Linear)]
                for layer in layers:
                    layer.register_forward_hook(lambda layer, _, __: seen.append(layer))
                module.eval()(torch.randn(2, WIDTH))
        assert seen[0].weight is model.get_parameter(first)


@pytest.mark.parametrize("name", MODELS)
def test_heads_come_back_from_their_file_with_the_first_layer(name: str, params: Params, tmp_path: Path) -> None:
    folder, model = tmp_path, MODELS[name](params)
    save_heads(folder, model.heads(), model.first_fc())
    loaded, first = load_heads(folder), load_first_fc(folder)
    assert loaded.keys() == model.heads().keys()
    assert all(torch.equal(tensor, loaded[n]) for n, tensor in model.heads().items())
    if FIRST_FC[name] is None:
        assert first is None
    else:
        assert first is not None
        assert torch.equal(first, model.state_dict()[FIRST_FC[name]])


def test_an_arm_without_heads_has_none(tmp_path: Path) -> None:
    folder = tmp_path
    assert (load_heads(folder), load_first_fc(folder)) == ({}, None)
    save_heads(folder, {}, None)
    assert (load_heads(folder), load_first_fc(folder)) == ({}, None)


def test_a_model_without_a_projector_and_copies_is_encoder_and_heads(params: Params) -> None:
    model = MAE(build_encoder(params.model, params.data), 0.75, 16, 1, 2)
    assert model.momentum_copies() == []
    assert all(role.follows is None for role in model.roles().values())
