"""The graft: contrastive learning continues on another arm's encoder (LGP, section 3.3).

`graft.policy` decides for each block its source, its learning rate, whether it is frozen, whether it is regularised
towards its start, and whether it learns by low-rank updates.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.compute.randomness import seeded
from lgp.models.contrastive import Contrastive, build_contrastive
from lgp.models.encoder_folder import check_start, load_encoder
from lgp.models.low_rank import LowRankQkv, merge_low_rank
from lgp.models.roles import Role, encoder_roles
from lgp.models.vit import build_encoder, init_encoder_as_moco
from lgp.params.file import Params
from lgp.params.graft import GraftParams, LoraParams
from lgp.pretrain.arm import Pretrained, Session
from lgp.pretrain.cl import Penalty, contrast
from lgp.training.optimizer import peak_rate


def stage_rates(roles: Mapping[str, Role], depth: int, rates: list[float]) -> dict[str, float]:
    """Give each parameter its learning rate (policy `stage_lr`; LGP, section 3.3).

    The blocks are cut into equal groups, the lowest first. Each group has one rate. The embeddings (class token, patch
    embedding) take the first rate. The final norm and the heads take the last rate.

    Args:
        roles: of the model's parameters.
        depth: number of blocks, a multiple of the number of rates.
        rates: one per group; the paper's are 1.5e-5, 1.5e-5, 1.5e-4 per 256 images.

    Returns:
        Parameter name → rate.
    """
    per_group = depth // len(rates)
    # layer 0 → first group, layers of the blocks → their groups, layer depth + 1 → last group
    return {name: rates[min(max(role.layer - 1, 0), depth - 1) // per_group] for name, role in roles.items()}


def decayed_rates(roles: Mapping[str, Role], depth: int, rate: float, decay: float) -> dict[str, float]:
    """Give each parameter its learning rate (policy `layer_decay`): `decay` times that of the block above.

    The final norm and the heads take `rate`, the last block rate · decay, and the embeddings rate · decay^(depth + 1),
    as in BEiT and LGP's released code. timm's groups give the same rates for an encoder with a classifier. Without a
    classifier timm's decay begins one block later.

    Args:
        roles: of the model's parameters.
        depth: number of blocks.
        rate: of the heads.
        decay: in (0, 1].

    Returns:
        Parameter name → rate.
    """
    return {name: rate * decay ** (depth + 1 - role.layer) for name, role in roles.items()}


def lower_names(encoder: VisionTransformer, lower_blocks: int) -> list[str]:
    """Name the parameters of the embeddings and the lowest blocks."""
    return [name for name, role in encoder_roles(encoder).items() if role.layer <= lower_blocks]


def freeze_lower(encoder: VisionTransformer, lower_blocks: int) -> None:
    """Freeze the embeddings and the lowest blocks (policy `freeze`): they get no gradient, no step and no weight decay.

    The mode of the frozen blocks is not changed. They have no dropout and no BatchNorm, so both modes compute the same.
    """
    for name in lower_names(encoder, lower_blocks):
        encoder.get_parameter(name).requires_grad_(False)


def add_low_rank(encoder: VisionTransformer, lora: LoraParams, frozen_blocks: int | None) -> None:
    """Hold all blocks but the last ones by low-rank updates (policy `lora`; ExPLoRA, Khanna et al. 2024).

    The free blocks and the final norm learn as they do without. Below them only the updates of queries and values and
    the norm layers learn. All other weights get no gradient, no step and no weight decay.

    Args:
        encoder: to be changed. `merge_low_rank` makes it plain again.
        lora: rank, alpha and number of free blocks.
        frozen_blocks: of the policy `freeze`: nothing learns in them and in the embeddings. None without that policy.
    """
    held = len(encoder.blocks) - lora.free_blocks
    freeze_lower(encoder, held)
    if frozen_blocks is None:
        encoder.norm_pre.requires_grad_(True)
    for block in encoder.blocks[frozen_blocks or 0 : held]:
        for name, parameter in block.named_parameters():
            parameter.requires_grad_("norm" in name)
        block.attn.qkv = LowRankQkv(block.attn.qkv, lora.rank, lora.alpha)


def regularized_names(encoder: VisionTransformer, lower_blocks: int) -> list[str]:
    """Name the parameters that the policy `l1` regularises: the trainable ones of the embeddings and lowest blocks."""
    return [name for name in lower_names(encoder, lower_blocks) if encoder.get_parameter(name).requires_grad]


def l1_penalty(encoder: VisionTransformer, lower_blocks: int, weight: float) -> Callable[[], Tensor]:
    """Return the penalty `weight` · Σ|θ - θ_0| over the embeddings and the lowest blocks (policy `l1`).

    θ_0 are the weights at the time of this call. LGP's released code has the same sum, over 12 blocks of ViT-L.
    """
    regularized = [encoder.get_parameter(name) for name in regularized_names(encoder, lower_blocks)]
    start = [p.detach().clone() for p in regularized]

    def penalty() -> Tensor:
        nonlocal start
        if start[0].device != regularized[0].device:
            start = [s.to(regularized[0].device) for s in start]
        return weight * torch.stack([(p - s).abs().sum() for p, s in zip(regularized, start, strict=True)]).sum()

    return penalty


def replace_upper(encoder: VisionTransformer, source: VisionTransformer, lower_blocks: int) -> None:
    """Copy the upper blocks and the final norm from `source` (policies `scratch_end`, `cl_end`)."""
    lower, parameters = lower_names(encoder, lower_blocks), dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name not in lower:
                parameter.copy_(parameters[name])


def pretrain_graft(session: Session, start: Path, end: Path) -> Pretrained:
    """Continue contrastive learning on the encoder in the folder `start`, as `graft.policy` says (LGP, section 3.3).

    The encoder and the momentum encoder start with the same weights. The heads start with random weights. Low-rank
    updates end merged into plain weights.

    Args:
        session: images, parameters, resume states and observer.
        start: encoder folder to graft on.
        end: encoder folder that gives the upper blocks under the policy `cl_end`.
    """
    params, graft = session.params, session.params.graft
    with seeded(params.seed, "graft/init"):
        encoder = _stitched(session, start, end)
        model = build_graft(encoder, params, len(session.data.pretraining_ids))
    rates = graft_rates(model, graft, params.model.depth)
    result = contrast("graft", model, rates, graft, session, _penalty(encoder, graft), graft.head_warmup_epochs)
    merge_low_rank(result.model)
    return result


def _penalty(encoder: VisionTransformer, graft: GraftParams) -> Penalty:
    """Return what the policy `l1` adds to the loss, nothing without that policy."""
    lower = graft.cut("l1")
    if lower is None or graft.l1 is None:
        return Penalty()
    regularized = frozenset(f"encoder.{name}" for name in regularized_names(encoder, lower))
    return Penalty(l1_penalty(encoder, lower, graft.l1.weight), regularized)


def build_graft(encoder: VisionTransformer, params: Params, images: int | None = None) -> Contrastive:
    """Put contrastive heads on the encoder to graft on. `freeze` and `lora` apply before the momentum copy."""
    frozen, lora = params.graft.cut("freeze"), params.graft.low_rank
    if frozen is not None:
        freeze_lower(encoder, frozen)
    if lora is not None:
        add_low_rank(encoder, lora, frozen)
    return build_contrastive(encoder, params.contrastive, images)


def _stitched(session: Session, start: Path, end: Path) -> VisionTransformer:
    """Load the encoder to graft on, and replace its upper blocks where the policy says so."""
    params = session.params
    check_start(start, params.model, params.data, session.data)
    encoder = load_encoder(start)
    kept = params.graft.cut("scratch_end")
    if kept is not None:
        anew = build_encoder(params.model, params.data)
        init_encoder_as_moco(anew)
        replace_upper(encoder, anew, kept)
    kept = params.graft.cut("cl_end")
    if kept is not None:
        check_start(end, params.model, params.data, session.data)
        replace_upper(encoder, load_encoder(end), kept)
    return encoder


def graft_rates(model: Contrastive, graft: GraftParams, depth: int) -> dict[str, float]:
    """Return parameter name → peak learning rate. The policy has exactly one of `stage_lr` and `layer_decay`."""
    roles = model.roles()
    if graft.stage_lr and "stage_lr" in graft.policy:
        return stage_rates(roles, depth, [peak_rate(lr, graft.batch_size) for lr in graft.stage_lr.base_lrs])
    assert graft.layer_decay is not None  # the parameters are checked
    return decayed_rates(roles, depth, peak_rate(graft.layer_decay.base_lr, graft.batch_size), graft.layer_decay.decay)
