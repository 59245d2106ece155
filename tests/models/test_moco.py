"""MoCo v3 against a slow reference written from its algorithm 1."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lgp.models.contrastive import build_contrastive
from lgp.models.heads import mlp
from lgp.models.moco import MoCo, contrastive_loss, momentum_at
from lgp.models.vit import View, build_encoder, features_of_view, init_encoder_as_moco
from lgp.params.file import Params


@pytest.fixture
def moco(params: Params) -> MoCo:
    encoder = build_encoder(params.model, params.data)
    init_encoder_as_moco(encoder)
    moco = build_contrastive(encoder, params.contrastive.model_copy(update={"momentum": 0.7}))
    assert isinstance(moco, MoCo)
    return moco


def slow_loss(queries: Tensor, keys: Tensor, temperature: float) -> float:
    def cosine(a: Tensor, b: Tensor) -> float:
        return (a @ b / (a.norm() * b.norm())).item()

    total = 0.0
    for i, q in enumerate(queries):
        logits = [cosine(q, k) / temperature for k in keys]
        total += -logits[i] + math.log(sum(math.exp(v) for v in logits))
    return 2 * temperature * total / len(queries)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_equals_the_slow_reference(temperature: float) -> None:
    queries, keys = torch.randn(7, 5).double() * 3, torch.randn(7, 5).double()
    assert contrastive_loss(queries, keys, temperature).item() == pytest.approx(
        slow_loss(queries, keys, temperature), rel=1e-6
    )


def test_heads_have_the_papers_layers() -> None:
    projector = mlp(3, 768, 4096, 256)
    assert [type(m).__name__ for m in projector] == ["Linear", "SyncBatchNorm1d", "ReLU"] * 2 + [
        "Linear",
        "SyncBatchNorm1d",
    ]
    linears = [m for m in projector if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features, m.bias) for m in linears] == [
        (768, 4096, None),
        (4096, 4096, None),
        (4096, 256, None),
    ]
    assert [m.affine for m in projector if isinstance(m, nn.BatchNorm1d)] == [True, True, False]


def test_model_has_a_projector_of_three_layers_and_a_predictor_of_two(moco: MoCo) -> None:
    heads = (moco.projector, moco.momentum_projector, moco.predictor)
    sizes = [[(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] for head in heads]
    three = [(16, 32), (32, 32), (32, 16)]
    assert sizes == [three, three, [(16, 32), (32, 16)]]


def test_momentum_copies_start_as_what_they_follow_and_are_for_no_optimizer(moco: MoCo) -> None:
    for follower, learner in moco.momentum_copies():
        for copied, learnt in zip(follower.parameters(), learner.parameters(), strict=True):
            assert torch.equal(copied, learnt)
            assert copied is not learnt
            assert not copied.requires_grad


def test_momentum_goes_from_base_to_one() -> None:
    assert momentum_at(0.0, 0.99) == pytest.approx(0.99)
    assert momentum_at(0.5, 0.99) == pytest.approx(0.995)
    assert momentum_at(1.0, 0.99) == pytest.approx(1.0)
    values = [momentum_at(i / 50, 0.9) for i in range(51)]
    assert values == sorted(values)


def test_momentum_encoder_is_the_running_mean(moco: MoCo) -> None:
    with torch.no_grad():
        for p in moco.encoder.parameters():
            p.add_(torch.randn_like(p))
    before = copy.deepcopy(moco.momentum_encoder.state_dict())
    moco.update_momentum_encoder(0.9)
    for name, key in moco.momentum_encoder.state_dict().items():
        expected = 0.9 * before[name] + 0.1 * moco.encoder.state_dict()[name]
        assert torch.allclose(key, expected, atol=1e-6), name


def test_forward_is_symmetric_and_moves_momentum_first(moco: MoCo) -> None:
    view1, view2 = torch.randn(6, 1, 8, 8).double(), torch.randn(6, 1, 8, 8).double()
    reference = copy.deepcopy(moco.double())
    with torch.no_grad():
        reference.update_momentum_encoder(0.7)
    queries = [reference.predictor(reference.projector(reference.encoder(v))) for v in (view1, view2)]
    keys = [reference.momentum_projector(reference.momentum_encoder(v)) for v in (view1, view2)]
    expected = slow_loss(queries[0], keys[1], 0.2) + slow_loss(queries[1], keys[0], 0.2)
    assert moco(View(view1), View(view2), 0.0).item() == pytest.approx(expected, rel=1e-6)


def test_gradient_reaches_the_query_side_only(moco: MoCo) -> None:
    moco(View(torch.randn(6, 1, 8, 8)), View(torch.randn(6, 1, 8, 8)), 0.5).backward()
    without = {name.split(".")[0] + "." + name.split(".")[1] for name, p in moco.named_parameters() if p.grad is None}
    momentum = {f"{n.split('.')[0]}.{n.split('.')[1]}" for n, _ in moco.named_parameters() if n.startswith("momentum_")}
    assert without == momentum | {"encoder.patch_embed", "encoder.pos_embed"}


def test_patch_embedding_trains_unless_frozen(params: Params) -> None:
    free = params.contrastive.model_copy(update={"freeze_patch_embed": False})
    moco = build_contrastive(build_encoder(params.model, params.data), free)
    assert moco.encoder.patch_embed.proj.weight.requires_grad
    assert not moco.encoder.pos_embed.requires_grad


def test_learning_encoder_sees_kept_patches_only_and_momentum_encoder_all(moco: MoCo) -> None:
    moco.eval()
    images, ids_keep = torch.randn(6, 1, 8, 8), torch.tensor([[0, 5, 9]]).expand(6, -1)
    other = images.clone()
    other[:, :, 4:, 6:] += 1  # patches 11 and 15 of the 4×4 grid
    query = features_of_view(moco.encoder, View(images, ids_keep))
    assert torch.equal(query, features_of_view(moco.encoder, View(other, ids_keep)))
    assert not torch.allclose(query, features_of_view(moco.encoder, View(images)))
    assert not torch.allclose(
        moco(View(images, ids_keep), View(images, ids_keep), 1.0),
        moco(View(other, ids_keep), View(other, ids_keep), 1.0),
    )


def test_keeping_every_patch_is_seeing_the_view_whole(moco: MoCo) -> None:
    moco.eval()
    images = torch.randn(3, 1, 8, 8)
    kept = features_of_view(moco.encoder, View(images, torch.arange(16).expand(3, -1)))
    assert torch.allclose(kept, features_of_view(moco.encoder, View(images)), atol=1e-6)


@pytest.fixture
def masked_views() -> tuple[View, View]:
    images = torch.randn(2, 6, 1, 8, 8).double()
    return View(images[0], torch.tensor([[0, 5, 9]]).expand(6, -1)), View(
        images[1], torch.tensor([[2, 3]]).expand(6, -1)
    )


def variant(params: Params, masked: str) -> MoCo:
    torch.manual_seed(0)
    changed = params.contrastive.model_copy(update={"mask_ratio": 0.75, "masked": masked})
    model = build_contrastive(build_encoder(params.model, params.data), changed)
    assert isinstance(model, MoCo)
    return model.double()


def test_masked_keys_see_the_patches_of_their_queries(params: Params, masked_views: tuple[View, View]) -> None:
    model, plain = variant(params, "queries_and_keys"), variant(params, "queries")
    queries = plain.queries(masked_views, None)
    keys = [plain.momentum_projector(features_of_view(plain.momentum_encoder, view)) for view in masked_views]
    expected = slow_loss(queries[0], keys[1], 0.2) + slow_loss(queries[1], keys[0], 0.2)
    assert model(*masked_views, 0.0).item() == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(plain(*masked_views, 0.0).item(), rel=1e-3)


def test_one_sided_loss_has_queries_of_the_masked_first_view_only(
    params: Params, masked_views: tuple[View, View]
) -> None:
    model, plain = variant(params, "one_sided"), variant(params, "queries")
    key = plain.momentum_projector(plain.momentum_encoder(masked_views[1].images))
    expected = slow_loss(plain.queries(masked_views[:1], None)[0], key, 0.2)
    assert model(*masked_views, 0.0).item() == pytest.approx(expected, rel=1e-6)
    model(*masked_views, 0.0).backward()
    assert all(p.grad is None for p in model.momentum_encoder.parameters())
