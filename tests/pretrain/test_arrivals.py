"""What arrives in each arm's training: images, weights, rates, masks, momentum, and what the loss is made of."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from arrivals import ARMS, INTERPOLATIONS, Arrivals, Coloured, Slow, arriving, same
from torch import Tensor

from lgp.compute.randomness import Stream
from lgp.models.encoder_folder import load_encoder
from lgp.params.pretrain import ViewParams

Recorded = Callable[[str], Arrivals]
CONTRASTIVE = [name for name in ARMS if name.startswith(("cl", "graft", "joint"))]
OBJECTIVES = {name: ARMS[name].get("contrastive", {}).get("objective", "mocov3") for name in CONTRASTIVE}
WITH_MOMENTUM = [name for name, objective in OBJECTIVES.items() if objective == "mocov3"]
MULTI_CROP = [name for name in CONTRASTIVE if name.endswith("multi_crop")]
COPIES = ("momentum_", "averaged_")
MASKED = ["mim", "reverse", "joint"]
DEPTH, PATCHES = 3, 16


def first_step(coloured: Coloured, folder: Any, name: str, **changes: Any) -> Arrivals:
    """Record the first step of a training with changed parameters."""
    with arriving(1) as trainings:
        coloured.train(name, folder, changes)
    return trainings[0]


def settings(coloured: Coloured, name: str) -> Any:
    """Return the section of an arm."""
    return getattr(coloured.params(ARMS[name]), name.split("_")[0])


def slow(coloured: Coloured, name: str) -> Slow:
    """Return the batches of an arm, made image by image."""
    params, arm = coloured.params(ARMS[name]), name.split("_")[0]
    masked = arm in ("mim", "reverse")
    views = ViewParams(crop_scale_min=0.5, flip_p=0.5) if masked else params.contrastive.views
    ids = np.flatnonzero([path.startswith(("train/", "unlabeled/")) for path in coloured.data.paths])
    ids = ids[~np.isin(ids, np.flatnonzero(coloured.data.index["part"] == "val"))]
    size = settings(coloured, name).batch_size
    return Slow(coloured.data, ids, views, 2 - masked, size, Stream(params.seed, arm), INTERPOLATIONS[arm])


def images_at(arrivals: Arrivals, step: int, encoder: str = "encoder") -> list[Tensor]:
    """Return what entered the patch embedding of an encoder in a step, call by call."""
    prefix = "contrastive." if arrivals.trainer.name == "joint" else ""
    return arrivals.steps[step].inputs[f"{prefix}{encoder}.patch_embed"]


# images


@pytest.mark.parametrize("name", MASKED)
def test_masked_modelling_gets_the_normalised_first_crop(name: str, recorded: Recorded, coloured: Coloured) -> None:
    batches = slow(coloured, name)
    for step in (0, 1, len(recorded(name).steps) - 1):
        expected = batches.normalized(batches.crops(step, 0))
        assert same(images_at(recorded(name), step)[-1], expected)


@pytest.mark.parametrize("name", CONTRASTIVE)
def test_each_contrastive_view_arrives_with_its_own_crop_and_colours(
    name: str, recorded: Recorded, coloured: Coloured
) -> None:
    batches = slow(coloured, name)
    for step in (0, 1, len(recorded(name).steps) - 1):
        arrived = images_at(recorded(name), step)
        if name == "cl_one_sided":  # its second view enters the momentum encoder alone
            arrived += images_at(recorded(name), step, "momentum_encoder")
        for view in (0, 1):
            expected = batches.normalized(batches.coloured(step, view))
            assert same(arrived[view], expected, levels=2), (step, view)


@pytest.mark.parametrize("name", MULTI_CROP)
def test_each_small_view_arrives_with_its_own_crop_and_colours(
    name: str, recorded: Recorded, coloured: Coloured
) -> None:
    """Small views pass the projection of patches in one call, after the large ones."""
    batches = slow(coloured, name)
    small = batches.small(coloured.params(ARMS[name]).contrastive.small_views)
    for step in (0, len(recorded(name).steps) - 1):
        arrived = recorded(name).steps[step].inputs["encoder.patch_embed.proj"]
        assert [len(images) for images in arrived] == [batches.batch_size] * 2 + [3 * batches.batch_size]
        for view, images in enumerate(arrived[-1].chunk(3)):
            assert same(images, batches.normalized(small.coloured(step, view)), levels=2), (step, view)


@pytest.mark.parametrize("name", [name for name in WITH_MOMENTUM if name != "cl_one_sided"])
def test_momentum_encoder_gets_the_same_two_views(name: str, recorded: Recorded) -> None:
    for step in (0, 5):
        of_encoder, of_momentum = (images_at(recorded(name), step, e) for e in ("encoder", "momentum_encoder"))
        assert len(of_momentum) == 2
        assert all(torch.equal(a, b) for a, b in zip(of_encoder[:2], of_momentum, strict=True))


@pytest.mark.parametrize("name", ["mim", "reverse"])
def test_normalised_images_have_mean_0_and_deviation_1(name: str, recorded: Recorded) -> None:
    arrived = torch.cat([images_at(recorded(name), step)[0] for step in range(6)])
    assert arrived.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (arrived.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2


@pytest.mark.parametrize("name", ["mim", "cl", "graft_stage_lr", "joint", "reverse"])
def test_flips_arrive_on_their_share_of_the_views(name: str, coloured: Coloured, tmp_path: Any) -> None:
    def arrived(flip_p: float) -> Tensor:
        views = {"crop_scale_min": 0.5, "flip_p": flip_p, "jitter_p": 0, "grayscale_p": 0}
        views |= {"blur_p": [0, 0], "solarize_p": [0, 0]}
        changes = {"contrastive": {"views": views}, "mim": {"flip_p": flip_p}}
        return torch.cat(images_at(first_step(coloured, tmp_path / str(flip_p), name, **changes), 0))

    straight, always, half = arrived(0), arrived(1), arrived(0.5)
    assert torch.equal(always, straight.flip(-1))
    assert not torch.equal(always, straight)
    mirrored = (half == straight.flip(-1)).flatten(1).all(1)
    assert torch.equal(half[~mirrored], straight[~mirrored])
    assert 0.2 < mirrored.double().mean() < 0.8


@pytest.mark.parametrize("name", ARMS)
def test_every_image_of_pretraining_comes_once_an_epoch_and_none_that_is_held_out(
    name: str, recorded: Recorded, coloured: Coloured
) -> None:
    crops, expected = recorded(name).trainer.crops, slow(coloured, name)
    assert crops.ids.tolist() == expected.ids.tolist()
    assert sum(path.startswith("unlabeled/") for path in np.array(coloured.data.paths)[crops.ids]) == 9
    assert not set(crops.ids) & {*coloured.data.ids("val"), *coloured.data.ids("test")}
    assert [crops.ids_of(step).tolist() for step in (0, 7)] == [expected.ids_of(step) for step in (0, 7)]


# masks


@pytest.mark.parametrize(("name", "seen"), [("mim", 4), ("reverse", 4), ("cl", 16), ("cl_masked", 8)])
def test_share_of_the_patches_that_the_mask_leaves_enters_the_blocks(name: str, seen: int, recorded: Recorded) -> None:
    step = recorded(name).steps[0]
    assert {tokens.shape[1] for tokens in step.inputs["encoder.blocks"]} == {1 + seen}
    assert {tokens.shape[1] for tokens in step.inputs["momentum_encoder.blocks"]} <= {1 + PATCHES}


@pytest.mark.parametrize(
    ("name", "queries", "keys"),
    [("cl_masked", [8, 8], [16, 16]), ("cl_masked_keys", [8, 8], [8, 8]), ("cl_one_sided", [8], [16])],
)
def test_queries_and_keys_see_the_patches_that_the_variant_says(
    name: str, queries: list[int], keys: list[int], recorded: Recorded
) -> None:
    step = recorded(name).steps[0]
    assert [tokens.shape[1] - 1 for tokens in step.inputs["encoder.blocks"]] == queries
    assert [tokens.shape[1] - 1 for tokens in step.inputs["momentum_encoder.blocks"]] == keys


def test_one_sided_loss_is_of_the_first_views_queries(recorded: Recorded) -> None:
    for step in recorded("cl_one_sided").steps[:3]:
        (query,), (key,) = step.outputs["predictor"], step.outputs["momentum_projector"]
        assert step.loss == pytest.approx(2 * 0.3 * info_nce(query, key, 0.3).item(), rel=1e-4)


def test_joint_masks_the_input_of_masked_modelling_alone(recorded: Recorded) -> None:
    entered = recorded("joint").steps[0].inputs["contrastive.encoder.blocks"]
    assert [tokens.shape[1] for tokens in entered] == [1 + PATCHES, 1 + PATCHES, 1 + 4]


@pytest.mark.parametrize(("name", "model"), [("mim", ""), ("reverse", ""), ("joint", "mae")])
def test_each_step_masks_by_its_own_noise(name: str, model: str, recorded: Recorded, coloured: Coloured) -> None:
    steps = recorded(name).steps
    stream = Stream(coloured.values["seed"], "joint/mim" if name == "joint" else name)
    for number in (0, 1, len(steps) - 1):
        images, noise = steps[number].inputs[model]
        assert torch.equal(noise, torch.rand(len(images), PATCHES, generator=stream.generator("mask", number)))


# weights at the start


def xavier(rows: int, columns: int) -> float:
    """Return the bound of Xavier's uniform distribution."""
    return math.sqrt(6 / (rows + columns))


@pytest.mark.parametrize(
    ("name", "prefix"), [("cl", ""), ("cl_simclr", ""), ("cl_vicreg", ""), ("joint", "contrastive.")]
)
def test_contrastive_arms_start_from_the_initialisation_of_moco_v3(name: str, prefix: str, recorded: Recorded) -> None:
    start, width = recorded(name).start, 16
    bounds = {"attn.qkv": xavier(width, width), "attn.proj": xavier(width, width), "mlp.fc1": xavier(4 * width, width)}
    for block in range(DEPTH):
        for layer, bound in bounds.items():
            weight = start[f"{prefix}encoder.blocks.{block}.{layer}.weight"]
            assert 0.95 * bound < weight.abs().max() <= bound, layer
            assert not start[f"{prefix}encoder.blocks.{block}.{layer}.bias"].any()
    patches = start[f"{prefix}encoder.patch_embed.proj.weight"]
    assert 0.95 * xavier(2 * 2 * 3, width) < patches.abs().max() <= xavier(2 * 2 * 3, width)
    assert 0 < start[f"{prefix}encoder.cls_token"].abs().max() < 1e-5


def test_mim_starts_from_the_initialisation_of_mae(recorded: Recorded) -> None:
    start, width = recorded("mim").start, 16
    bounds = {
        "attn.qkv": xavier(3 * width, width),
        "attn.proj": xavier(width, width),
        "mlp.fc2": xavier(width, 4 * width),
    }
    names = [f"encoder.blocks.{i}" for i in range(DEPTH)] + ["decoder_blocks.0", "decoder_blocks.1"]
    for block in names:
        for layer, bound in bounds.items():
            assert 0.95 * bound < start[f"{block}.{layer}.weight"].abs().max() <= bound, (block, layer)
            assert not start[f"{block}.{layer}.bias"].any()
    for token in ("encoder.cls_token", "mask_token"):
        assert 0.01 < start[token].std() < 0.04


@pytest.mark.parametrize(
    ("name", "upper_from"),
    [("graft_stage_lr", 4), ("graft_l1", 4), ("graft_freeze", 4), ("graft_cl_end", 2), ("reverse", 4)],
)
def test_continued_arms_start_from_the_bytes_of_the_folders(
    name: str, upper_from: int, recorded: Recorded, coloured: Coloured
) -> None:
    lower, upper = (
        load_encoder(f).state_dict() for f in (coloured.cl if name == "reverse" else coloured.mim, coloured.cl)
    )
    for of_encoder, tensor in lower.items():
        source = upper if upper_from <= layer_of(f"encoder.{of_encoder}") - 1 else lower
        assert torch.equal(recorded(name).start[f"encoder.{of_encoder}"], source[of_encoder]), of_encoder
        assert tensor.shape == source[of_encoder].shape


def test_scratch_end_starts_the_upper_blocks_from_the_initialisation_of_moco_v3(
    recorded: Recorded, coloured: Coloured
) -> None:
    start, kept = recorded("graft_scratch_end").start, load_encoder(coloured.mim).state_dict()
    for block in range(DEPTH):
        weight = start[f"encoder.blocks.{block}.attn.qkv.weight"]
        assert torch.equal(weight, kept[f"blocks.{block}.attn.qkv.weight"]) == (block < 1)
        assert block < 1 or 0.95 * xavier(16, 16) < weight.abs().max() <= xavier(16, 16)
    assert torch.equal(start["encoder.norm.weight"], torch.ones(16))


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_momentum_copies_start_as_what_they_follow(name: str, recorded: Recorded) -> None:
    start = recorded(name).start
    copies = [key for key in start if "momentum_" in key]
    assert len(copies) > 40
    assert all(torch.equal(start[key], start[key.replace("momentum_", "")]) for key in copies)


@pytest.mark.parametrize("name", ["mim", "cl", "cl_simclr", "cl_vicreg", "graft_stage_lr", "joint", "reverse"])
def test_new_weights_are_random_and_the_seed_decides_them(
    name: str, recorded: Recorded, coloured: Coloured, tmp_path: Any
) -> None:
    torch.manual_seed(77)  # which decides nothing
    again, other = (first_step(coloured, tmp_path / str(seed), name, seed=seed).start for seed in (0, 1))
    start = recorded(name).start
    assert all(torch.equal(tensor, again[key]) for key, tensor in start.items())
    heads = [key for key in start if key.endswith(("projector.0.weight", "predictor.0.weight", "decoder_pred.weight"))]
    assert heads
    assert not any(torch.equal(start[key], other[key]) for key in heads)
    assert all(0.01 < start[key].std() < 1 for key in heads)
    anew = name.split("_")[0] not in ("graft", "reverse")
    assert torch.equal(*(w[next(k for k in w if k.endswith("fc1.weight"))] for w in (start, other))) != anew


# optimizer


def layer_of(parameter: str) -> int:
    """Return 0 for the embeddings, 1 + i for block i, DEPTH + 1 for the final norm and the heads."""
    parts = parameter.removeprefix("contrastive.").removeprefix("mae.").split(".")
    if parts[0] != "encoder" or parts[1] == "norm":
        return DEPTH + 1
    return int(parts[2]) + 1 if parts[1] == "blocks" else 0


def peak_of(name: str, parameter: str) -> float:
    """Return the highest rate of a parameter, by the numbers in `SETTINGS`."""
    layer = layer_of(parameter)
    third = min(max(layer - 1, 0), DEPTH - 1)
    base, batch = {
        "mim": (0.01, 8),
        "cl": (0.02, 10),
        "joint": (0.04, 12),
        "reverse": ((0.005, 0.01, 0.05)[third], 14),
        "graft": (
            0.05 * 0.5 ** (DEPTH + 1 - layer)
            if "layer_decay" in ARMS[name].get("graft", {}).get("policy", ())
            else (0.003, 0.006, 0.03)[third],
            16,
        ),
    }[name.split("_")[0]]
    return base * batch / 256


# steps of an epoch, epochs, epochs of warm-up, weight decay
RECIPES = {"mim": (6, 2, 1, 0.01), "cl": (4, 3, 1, 0.02), "graft": (3, 4, 2, 0.03), "joint": (4, 2, 1, 0.04)} | {
    "reverse": (3, 3, 1, 0.05)
}


@pytest.mark.parametrize("name", ARMS)
def test_rates_of_every_parameter_follow_warm_up_and_cosine(name: str, recorded: Recorded) -> None:
    per_epoch, epochs, warmup_epochs, _ = RECIPES[name.split("_")[0]]
    steps, warmup = per_epoch * epochs, per_epoch * warmup_epochs
    assert len(recorded(name).steps) == steps
    last = (1 + math.cos(math.pi * (steps - 1 - warmup) / (steps - warmup))) / 2
    for step, share in ((0, 0.0), (1, 1 / warmup), (warmup - 1, 1 - 1 / warmup), (warmup, 1.0), (steps - 1, last)):
        rates = recorded(name).steps[step].rates
        assert rates == pytest.approx({parameter: share * peak_of(name, parameter) for parameter in rates})


@pytest.mark.parametrize("name", ARMS)
def test_optimizer_has_the_trained_parameters_with_their_decay_and_the_betas(name: str, recorded: Recorded) -> None:
    arrivals = recorded(name)
    decay = RECIPES[name.split("_")[0]][3]
    fixed = ["pos_embed"] + (
        ["patch_embed"] if name.startswith(("cl", "graft", "joint")) and name != "cl_masked" else []
    )
    fixed += ["encoder.cls_token", "encoder.blocks.0."] if name == "graft_freeze" else []
    if name == "graft_lora":
        held = (*(f"encoder.blocks.{block}.{part}" for block in (0, 1) for part in ("mlp", "attn.proj")), "cls_token")
        fixed += [*held, *(f"encoder.blocks.{b}.attn.qkv.{part}" for b in (0, 1) for part in ("weight", "bias"))]
    trained = {
        key: 0.0 if parameter.ndim == 1 else decay
        for key, parameter in arrivals.parameters.items()
        if not any(part in key for part in [*fixed, *COPIES, "decoder_pos_embed"])
    }
    assert arrivals.grouped("weight_decay") == trained
    betas = (0.9, 0.95) if name in ("mim", "reverse") else (0.9, 0.999)
    assert set(arrivals.grouped("betas").values()) == {betas}


@pytest.mark.parametrize("name", ARMS)
def test_step_moves_what_the_optimizer_has_and_nothing_else(name: str, recorded: Recorded) -> None:
    arrivals = recorded(name)
    before, after = (arrivals.steps[step].weights for step in (1, 2))
    moved = {key for key in arrivals.parameters if not torch.equal(before[key], after[key])}
    trained = set(arrivals.grouped("lr"))
    copies = {key for key in arrivals.parameters if any(part in key for part in COPIES)}
    assert trained - moved <= {key for key in trained if key.endswith("bias")}  # whose gradient may be 0
    assert moved <= trained | copies


# what the loss is made of


@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_momentum_goes_from_its_first_value_to_nearly_one(name: str, recorded: Recorded) -> None:
    """θ_k at the next step is m θ_k + (1 - m) θ_q, with θ_q before the optimizer's step."""
    prefix, steps = "contrastive." if name == "joint" else "", recorded(name).steps
    key, query = (f"{prefix}{part}projector.0.weight" for part in ("momentum_", ""))
    for step in (2, len(steps) - 2):
        momentum = 1 - (1 - 0.9) * (1 + math.cos(math.pi * step / len(steps))) / 2
        now, after = steps[step].weights, steps[step + 1].weights
        assert torch.allclose(after[key], momentum * now[key] + (1 - momentum) * now[query], atol=1e-7)
        assert not torch.equal(now[key], now[query])


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of each query with its key among all keys."""
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits)))


@pytest.mark.parametrize(
    "name", ["cl", "cl_masked", "cl_masked_keys", "graft_stage_lr", "graft_freeze", "graft_cl_end"]
)
def test_loss_is_of_the_heads_outputs_at_the_temperature(name: str, recorded: Recorded) -> None:
    for step in recorded(name).steps[:3]:
        (q1, q2), (k1, k2) = step.outputs["predictor"], step.outputs["momentum_projector"]
        expected = 2 * 0.3 * (info_nce(q1, k2, 0.3) + info_nce(q2, k1, 0.3))
        assert step.loss == pytest.approx(expected.item(), rel=1e-4)


def test_loss_of_simclr_is_of_the_projections_at_the_temperature(recorded: Recorded) -> None:
    step = recorded("cl_simclr").steps[0]
    z = F.normalize(torch.cat(step.outputs["projector"]), dim=1)
    logits = (z @ z.T / 0.3).fill_diagonal_(-torch.inf)
    assert step.loss == pytest.approx(F.cross_entropy(logits, torch.arange(20).roll(10)).item(), rel=1e-4)


def test_loss_of_vicreg_is_of_the_projections(recorded: Recorded) -> None:
    step = recorded("cl_vicreg").steps[0]
    z1, z2 = step.outputs["projector"]
    expected = 25 * (z1 - z2).square().mean()
    for z in (z1, z2):
        covariance = torch.cov(z.T)
        expected += 25 * (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
        expected += (covariance - covariance.diag().diag()).square().sum() / z.shape[1]
    assert step.loss == pytest.approx(expected.item(), rel=1e-4)


def test_l1_adds_the_weighted_distance_of_the_lower_blocks_from_their_start(recorded: Recorded) -> None:
    arrivals = recorded("graft_l1")
    lower = ("encoder.cls_token", "encoder.blocks.0.", "encoder.blocks.1.")
    for step in arrivals.steps[::4]:
        distance = sum((step.weights[k] - w).abs().sum() for k, w in arrivals.start.items() if k.startswith(lower))
        added = step.loss - step.outputs[""][0].item()
        assert added == pytest.approx(1e-3 * float(distance), abs=2e-6)
    assert added > 1e-4


def test_joint_adds_the_weighted_loss_of_masked_modelling(recorded: Recorded) -> None:
    for step in recorded("joint").steps:
        contrastive, masked = (step.outputs[model][0].item() for model in ("contrastive", "mae"))
        assert step.loss == pytest.approx(contrastive + 0.7 * masked, rel=1e-5)


@pytest.mark.parametrize("name", ["mim", "reverse"])
def test_loss_of_masked_modelling_is_of_the_hidden_patches(name: str, recorded: Recorded) -> None:
    step = recorded(name).steps[0]
    images, noise = step.inputs[""]
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    hidden = torch.ones(len(images), PATCHES).scatter(1, noise.argsort(1)[:, :4], 0).bool()
    predicted = step.outputs["decoder_pred"][0][:, 1:]
    assert step.loss == pytest.approx((predicted - target)[hidden].square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("name", ARMS)
def test_history_is_the_mean_loss_of_each_epoch_and_the_last_rate(name: str, recorded: Recorded) -> None:
    arrivals = recorded(name)
    per_epoch, epochs, _, _ = RECIPES[name.split("_")[0]]
    history = arrivals.trainer.now.history
    assert [values["epoch"] for values in history] == list(range(1, epochs + 1))
    for number, values in enumerate(history):
        steps = arrivals.steps[number * per_epoch : (number + 1) * per_epoch]
        assert values["train/loss"] == pytest.approx(np.mean([step.loss for step in steps]), rel=1e-6)
        assert values["train/lr"] == pytest.approx(max(steps[-1].rates.values()))
    assert all(step.training for step in arrivals.steps)
