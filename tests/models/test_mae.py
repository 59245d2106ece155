"""MAE against a slow reference written from the paper."""

import pytest
import torch
from torch import Tensor, nn

from lgp.models.mae import MAE, normalize_patches, patchify, random_masking, unpatchify
from lgp.models.vit import build_encoder, init_encoder_as_mae, sincos_positions
from lgp.params.file import Params


@pytest.fixture
def mae(params: Params) -> MAE:
    encoder = build_encoder(params.model, params.data)
    init_encoder_as_mae(encoder)
    return MAE(encoder, 0.75, decoder_width=16, decoder_depth=1, decoder_heads=2).double()


def slow_patch(image: Tensor, row: int, column: int, p: int) -> list[float]:
    return [image[c, row * p + y, column * p + x].item() for y in range(p) for x in range(p) for c in range(len(image))]


def test_patchify_order_and_inverse() -> None:
    images = torch.randn(2, 3, 8, 8)
    patches = patchify(images, 4)
    assert patches.shape == (2, 4, 48)
    for n, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert patches[1, n].tolist() == slow_patch(images[1], row, column, 4)
    assert torch.equal(unpatchify(patches, 4, 3), images)


def test_target_is_each_patch_normalised() -> None:
    patches = torch.randn(2, 5, 12).double() * 7 + 3
    target = normalize_patches(patches)
    for b in range(2):
        for n in range(5):
            values = patches[b, n].tolist()
            mean = sum(values) / 12
            variance = sum((v - mean) ** 2 for v in values) / 11
            assert target[b, n].tolist() == pytest.approx([(v - mean) / (variance + 1e-6) ** 0.5 for v in values])


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(16, 0.75, 4), (196, 0.75, 49), (10, 0.55, 4)])
def test_masking_keeps_the_smallest_noise_and_the_right_number(patches: int, ratio: float, kept: int) -> None:
    noise = torch.rand(6, patches)
    ids_keep, ids_restore, mask = random_masking(noise, ratio)
    assert ids_keep.shape == (6, kept)
    assert (mask.sum(dim=1) == patches - kept).all()
    for b in range(6):
        assert ids_keep[b].tolist() == sorted(range(patches), key=lambda n: noise[b, n].item())[:kept]
        assert sorted(ids_keep[b].tolist()) == (mask[b] == 0).nonzero().flatten().tolist()
        assert sorted(ids_restore[b].tolist()) == list(range(patches))


def test_decoder_normalises_as_the_encoder_does(mae: MAE) -> None:
    norms = [module for module in mae.decoder_blocks.modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in [*norms, mae.decoder_norm]} == {1e-6}
    assert len(norms) == 2


def test_loss_equals_the_slow_reference(mae: MAE) -> None:
    images, noise = torch.randn(3, 1, 8, 8).double(), torch.rand(3, 16)
    latent, _, ids_restore = mae.encode(images, noise)
    prediction = mae.decode(latent, ids_restore)
    errors = []
    for b in range(3):
        removed = sorted(range(16), key=lambda n: noise[b, n].item())[4:]
        for n in removed:
            patch = torch.tensor(slow_patch(images[b], n // 4, n % 4, 2)).double()
            target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append(((prediction[b, n] - target) ** 2).mean().item())
    assert mae(images, noise).item() == pytest.approx(sum(errors) / len(errors), rel=1e-6)


def test_encoder_sees_kept_patches_only(mae: MAE) -> None:
    images, noise = torch.randn(1, 1, 8, 8).double(), torch.rand(1, 16)
    latent, mask, _ = mae.encode(images, noise)
    removed = mask[0].bool().nonzero().flatten()
    other = patchify(images, 2)
    other[0, removed] += 5
    changed, _, _ = mae.encode(unpatchify(other, 2, 1), noise)
    assert torch.equal(latent, changed)


def test_decoder_puts_every_token_back_in_its_place(mae: MAE) -> None:
    images, noise = torch.randn(1, 1, 8, 8).double(), torch.rand(1, 16)
    ids_keep, ids_restore, mask = random_masking(noise, 0.75)
    seen = {}
    mae.decoder_blocks.register_forward_pre_hook(lambda _, args: seen.update(tokens=args[0]))
    latent, _, _ = mae.encode(images, noise)
    mae.decode(latent, ids_restore)
    tokens = seen["tokens"] - mae.decoder_pos_embed
    embedded = mae.decoder_embed(latent)
    for n in range(16):
        if mask[0, n]:
            assert torch.allclose(tokens[0, 1 + n], mae.mask_token[0, 0])
        else:
            place = ids_keep[0].tolist().index(n)
            assert torch.allclose(tokens[0, 1 + n], embedded[0, 1 + place])


def test_decoder_has_fixed_positions_of_its_own_and_the_papers_initialisation(params: Params) -> None:
    mae = MAE(build_encoder(params.model, params.data), 0.75, decoder_width=16, decoder_depth=1, decoder_heads=2)
    assert torch.equal(mae.decoder_pos_embed, sincos_positions(16, 4))
    assert not mae.decoder_pos_embed.requires_grad
    layers = [mae.decoder_embed, *mae.decoder_blocks.modules(), mae.decoder_pred]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            bound = (6 / sum(layer.weight.shape)) ** 0.5  # Xavier uniform
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()
    assert mae.decoder_blocks[0].attn.qkv.bias is not None
    norms = [layer for layer in mae.modules() if isinstance(layer, nn.LayerNorm)]
    assert {layer.eps for layer in norms} == {1e-6}
    assert 0.01 < mae.mask_token.std() < 0.03


def test_loss_trains_every_parameter_but_positions(mae: MAE) -> None:
    mae(torch.randn(4, 1, 8, 8).double(), torch.rand(4, 16)).backward()
    without = {name for name, p in mae.named_parameters() if p.grad is None}
    assert without == {"encoder.pos_embed", "decoder_pos_embed"}


def test_reconstruction_keeps_what_was_seen(mae: MAE) -> None:
    images, noise = torch.randn(2, 1, 8, 8).double(), torch.rand(2, 16)
    painted, masked = mae.reconstruct(images, noise)
    kept = random_masking(noise, 0.75)[2] == 0
    assert torch.allclose(patchify(painted, 2)[kept], patchify(images, 2)[kept])
    assert (patchify(masked, 2)[~kept] == 0).all()


def test_target_of_a_patch_of_one_colour_is_zero_and_of_a_faint_one_small() -> None:
    flat = torch.full((1, 1, 12), 0.3).double()
    assert torch.allclose(normalize_patches(flat), torch.zeros(()).double(), atol=1e-9)
    faint = flat + 1e-3 * torch.linspace(-1, 1, 12)
    assert normalize_patches(faint).var().item() == pytest.approx(faint.var().item() / (faint.var().item() + 1e-6))


def test_masked_input_shows_the_visible_patches_and_the_reconstruction_has_the_hidden_ones_in_their_colours(
    mae: MAE,
) -> None:
    images, noise = torch.randn(2, 1, 8, 8).double() * 3 + 1, torch.rand(2, 16)
    painted, masked = mae.reconstruct(images, noise)
    latent, mask, ids_restore = mae.encode(images, noise)
    patches, hidden = patchify(images, 2), mask.bool()
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = mae.decode(latent, ids_restore) * std + mean
    assert torch.allclose(patchify(painted, 2)[hidden], expected[hidden])
    assert torch.equal(patchify(masked, 2)[~hidden], patches[~hidden])


def test_decoder_paints_whole_patches_and_has_the_norms_of_mae(params: Params) -> None:
    for patch_size in (1, 2, 4):
        model = params.model.model_copy(update={"patch_size": patch_size})
        mae = MAE(build_encoder(model, params.data), 0.5, 16, 1, 4)
        assert mae.decoder_pred.out_features == patch_size * patch_size
    norms = [layer for layer in mae.decoder_blocks.modules() if isinstance(layer, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
