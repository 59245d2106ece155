"""Multi-crop: features of small views, and the terms of every objective, against loops written from the papers."""

import pytest
import torch
from test_moco import slow_loss
from test_simclr import slow_nt_xent
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from lgp.models.moco import MoCo, OneSidedMoCo
from lgp.models.multi_crop import of_views
from lgp.models.simclr import SimCLR
from lgp.models.vicreg import VICReg, vicreg_loss
from lgp.models.vit import View, build_encoder, features_of_view
from lgp.params.file import Params
from lgp.params.pretrain import VicregWeights


@pytest.fixture
def large() -> tuple[View, View]:
    return View(torch.randn(5, 1, 8, 8).double()), View(torch.randn(5, 1, 8, 8).double())


@pytest.fixture
def small() -> Tensor:
    return torch.randn(3, 5, 1, 4, 4).double()


def test_small_image_gets_the_positions_of_its_grid_resampled_from_the_whole(params: Params) -> None:
    """The reference is a ViT built for the small size, with the positions that timm resamples for it."""
    encoder = build_encoder(params.model, params.data).eval()
    own = build_encoder(params.model, params.data.model_copy(update={"image_size": 4})).eval()
    state = encoder.state_dict()
    resampled = resample_abs_pos_embed(state["pos_embed"], [2, 2], num_prefix_tokens=1, antialias=False)
    own.load_state_dict(state | {"pos_embed": resampled})
    images = torch.randn(6, 1, 4, 4)
    assert torch.allclose(features_of_view(encoder, View(images)), own(images), atol=1e-6)
    assert not torch.allclose(resampled[0, 1:], state["pos_embed"][0, 1:5], atol=1e-2)


@pytest.mark.parametrize("parts", [1, 5])
def test_features_of_several_blocks_are_cut_into_views(parts: int, large: tuple[View, View], small: Tensor) -> None:
    def encode(view: View) -> Tensor:
        flat = view.images.flatten(1)
        return torch.stack([flat[:, :4], -flat[:, 4:8]])  # (2, B, 4): of two blocks

    found = of_views(encode, large, small, parts)
    expected = [encode(view) for view in (*large, *map(View, small))]
    assert len(found) == 5
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_moco_compares_every_small_query_with_both_keys(
    params: Params, large: tuple[View, View], small: Tensor
) -> None:
    model = MoCo(build_encoder(params.model, params.data), 32, 16, 32, 0.2, 0.9).eval().double()
    queries = [model.predictor(model.projector(features_of_view(model.encoder, view))) for view in large]
    queries += [model.predictor(model.projector(features_of_view(model.encoder, View(images)))) for images in small]
    keys = [model.momentum_projector(model.momentum_encoder(view.images)) for view in large]
    terms = [slow_loss(queries[0], keys[1], 0.2), slow_loss(queries[1], keys[0], 0.2)]
    terms += [slow_loss(query, key, 0.2) for query in queries[2:] for key in keys]
    assert len(terms) == 8
    assert model(*large, 0.0, small).item() == pytest.approx(2 * sum(terms) / 8, rel=1e-6)
    one_sided = OneSidedMoCo(build_encoder(params.model, params.data), 32, 16, 32, 0.2, 0.9).eval().double()
    one_sided.load_state_dict(model.state_dict())
    terms = [slow_loss(query, keys[1], 0.2) for query in (queries[0], *queries[2:])]
    assert one_sided(*large, 0.0, small).item() == pytest.approx(sum(terms) / 4, rel=1e-6)


def test_simclr_and_vicreg_average_over_pairs_with_a_large_view(
    params: Params, large: tuple[View, View], small: Tensor
) -> None:
    weights = VicregWeights()
    simclr = SimCLR(build_encoder(params.model, params.data), 32, 16, 0.3).eval().double()
    vicreg = VICReg(build_encoder(params.model, params.data), 32, 16, weights).eval().double()
    of_pair = {
        simclr: lambda a, b: slow_nt_xent(a, b, 0.3),
        vicreg: lambda a, b: vicreg_loss(a, b, weights).item(),
    }
    for model, loss in of_pair.items():
        z = [model.projector(features_of_view(model.encoder, view)) for view in large]
        z += [model.projector(features_of_view(model.encoder, View(images))) for images in small]
        terms = [loss(z[0], z[1])] + [loss(z[u], z[v]) for v in (2, 3, 4) for u in (0, 1)]
        assert model(*large, 0.0, small).item() == pytest.approx(sum(terms) / 7, rel=1e-6)
