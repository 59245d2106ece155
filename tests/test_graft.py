"""The graft's rule for learning rates, and what it starts from."""

from pathlib import Path

import pytest
import timm
import torch

from lgp.checkpoint import StateStore, load_encoder, save_encoder
from lgp.data.prepared import Prepared
from lgp.errors import LgpError
from lgp.graft import pretrain_graft, stage_rates
from lgp.models.vit import build_encoder, init_encoder_as_mae
from lgp.params import Params
from lgp.pretrain import Session


class Silent:
    """An observer that takes no notice."""

    def log_epoch(self, values: dict[str, float]) -> None:
        """Take nothing."""


@pytest.mark.parametrize("depth", [12, 24])
def test_rates_are_the_papers(depth: int) -> None:
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=depth)
    names = [f"encoder.{n}" for n, _ in encoder.named_parameters()] + ["projector.0.weight", "predictor.0.weight"]
    rates = stage_rates(names, depth, [1.5e-5, 1.5e-5, 1.5e-4])
    for name, rate in rates.items():
        parts = name.split(".")
        high = parts[0] != "encoder" or parts[1] == "norm" or (parts[1] == "blocks" and int(parts[2]) >= depth * 2 // 3)
        assert rate == (1.5e-4 if high else 1.5e-5), name


def test_unequal_groups_are_refused() -> None:
    with pytest.raises(LgpError, match="12 blocks cannot be cut into 5 equal groups"):
        stage_rates([], 12, [1.0] * 5)


@pytest.fixture
def mim_encoder(tmp_path: Path, params: Params, prepared: Prepared) -> Path:
    encoder = build_encoder(params.model, params.data)
    init_encoder_as_mae(encoder)
    save_encoder(tmp_path / "mim" / "encoder", encoder, params.model, params.data, prepared, {})
    return tmp_path / "mim" / "encoder"


def test_zero_rates_keep_the_lower_blocks_bitwise(
    tmp_path: Path, params: Params, prepared: Prepared, mim_encoder: Path
) -> None:
    graft = params.graft.model_copy(update={"stage_base_lrs": [0.0, 0.0, 8e-3], "weight_decay": 0.0})
    params = params.model_copy(update={"graft": graft})
    result = pretrain_graft(Session(prepared, params, StateStore(tmp_path / "state", "code"), Silent()), mim_encoder)
    start = load_encoder(mim_encoder).state_dict()
    for name, tensor in result.encoder.state_dict().items():
        moved = name.startswith(("blocks.2.", "norm."))
        assert torch.equal(tensor, start[name]) != moved, name


def test_encoder_of_other_dimensions_is_refused(
    tmp_path: Path, params: Params, prepared: Prepared, mim_encoder: Path
) -> None:
    other = params.model_copy(update={"model": params.model.model_copy(update={"width": 32})})
    with pytest.raises(LgpError, match=r"was trained with .*'embed_dim': 16.*train it anew"):
        pretrain_graft(Session(prepared, other, StateStore(tmp_path / "state", "code"), Silent()), mim_encoder)
