"""The graft: contrastive learning continues on another arm's encoder (LGP, section 3.3).

What `graft.policy` names is put together here: which blocks come from where, at which learning rates, what is
frozen, and what is pulled back to where it started.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lgp.checkpoint import check_encoder_fits, load_encoder
from lgp.cl import Contrastive, build_contrastive, contrast
from lgp.models.vit import EMBEDDINGS, block_of, build_encoder, init_encoder_as_moco
from lgp.optim import peak_rate
from lgp.params import GraftParams, Params
from lgp.pretrain import Pretrained, Session
from lgp.randomness import seeded


def stage_rates(parameter_names: list[str], depth: int, rates: list[float]) -> dict[str, float]:
    """Give each parameter its learning rate (policy `stage_lr`; LGP, section 3.3).

    The blocks are cut into equal groups, one rate each, from the lowest; what comes before the blocks
    (class token, patch embedding) takes the first rate, the final norm and the heads the last.

    Args:
        parameter_names: of a model whose encoder is `encoder`; all other names are heads.
        depth: number of blocks, a multiple of the number of rates.
        rates: one per group; the paper's are 1.5e-5, 1.5e-5, 1.5e-4 per 256 images.

    Returns:
        name → rate.
    """
    per_group = depth // len(rates)

    def rate(name: str) -> float:
        block = block_of(name)
        if block is not None:
            return rates[block // per_group]
        return rates[0] if _is_below(name.removeprefix("encoder."), 0) else rates[-1]

    return {name: rate(name) for name in parameter_names}


def decayed_rates(parameter_names: list[str], depth: int, rate: float, decay: float) -> dict[str, float]:
    """Give each parameter its learning rate (policy `layer_decay`), `decay` times less with every block below.

    Final norm and heads take `rate`, the last block `decay` times it, the embeddings decay^(depth + 1) times it, as
    in BEiT and LGP's released code. timm's groups give the same for an encoder with a classifier; without one they
    begin a block later.

    Args:
        parameter_names: of a model whose encoder is `encoder`; all other names are heads.
        depth: number of blocks.
        rate: of the heads.
        decay: in (0, 1].

    Returns:
        name → rate.
    """

    def blocks_above(name: str) -> int:
        block = block_of(name)
        if block is not None:
            return depth - block
        return depth + 1 if _is_below(name.removeprefix("encoder."), 0) else 0

    return {name: rate * decay ** blocks_above(name) for name in parameter_names}


def freeze_lower(encoder: VisionTransformer, lower_blocks: int) -> None:
    """Fix embeddings and the lowest blocks (policy `freeze`): no gradient, so no decay and no step either.

    A ViT's blocks behave alike in training and evaluation here (no dropout, no BatchNorm), so no mode is set.
    """
    for name, parameter in encoder.named_parameters():
        if _is_below(name, lower_blocks):
            parameter.requires_grad_(False)


def pulled_names(encoder: VisionTransformer, lower_blocks: int) -> list[str]:
    """Name the parameters that the policy `l1` pulls: the trainable ones of embeddings and lowest blocks."""
    return [name for name, p in encoder.named_parameters() if _is_below(name, lower_blocks) and p.requires_grad]


def l1_pull(encoder: VisionTransformer, lower_blocks: int, weight: float) -> Callable[[], Tensor]:
    """Return the penalty `weight` · Σ|θ - θ_0| over embeddings and the lowest blocks (policy `l1`).

    θ_0 are the weights as they are now; LGP's released code sums likewise, over the first 12 blocks of ViT-L.
    """
    pulled = [encoder.get_parameter(name) for name in pulled_names(encoder, lower_blocks)]
    start = [p.detach().clone() for p in pulled]

    def penalty() -> Tensor:
        nonlocal start
        if start and start[0].device != pulled[0].device:
            start = [s.to(pulled[0].device) for s in start]
        return weight * torch.stack([(p - s).abs().sum() for p, s in zip(pulled, start, strict=True)]).sum()

    return penalty


def replace_upper(encoder: VisionTransformer, source: VisionTransformer, lower_blocks: int) -> None:
    """Take all but the lowest blocks, and the final norm, from another encoder (`scratch_end`, `cl_end`)."""
    parameters = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if not _is_below(name, lower_blocks):
                parameter.copy_(parameters[name])


def _is_below(name: str, lower_blocks: int) -> bool:
    """Whether an encoder's parameter is of the embeddings or of the lowest blocks."""
    block = block_of(name)
    return name.startswith(EMBEDDINGS) if block is None else block < lower_blocks


def pretrain_graft(session: Session, start: Path, end: Path) -> Pretrained:
    """Continue contrastive learning on the encoder in the folder `start`, as `graft.policy` says (LGP, section 3.3).

    Encoder and momentum encoder start alike, the heads anew.

    Args:
        session: images, parameters, resume states and observer.
        start: encoder folder to graft on.
        end: encoder folder that gives the upper blocks under the policy `cl_end`.
    """
    params, graft = session.params, session.params.graft
    with seeded(params.seed, "graft/init"):
        encoder = _stitched(params, start, end)
        model = build_graft(encoder, params)
    rates = graft_rates(model, graft, params.model.depth)
    pulled = graft.cut("l1")
    if pulled is None or graft.l1 is None:
        return contrast("graft", model, rates, graft, session)
    held = frozenset(f"encoder.{name}" for name in pulled_names(encoder, pulled))
    return contrast("graft", model, rates, graft, session, l1_pull(encoder, pulled, graft.l1.weight), held)


def build_graft(encoder: VisionTransformer, params: Params) -> Contrastive:
    """Put contrastive heads on the encoder to graft on, what the policy freezes fixed before it is copied."""
    frozen = params.graft.cut("freeze")
    if frozen is not None:
        freeze_lower(encoder, frozen)
    return build_contrastive(encoder, params.contrastive)


def _stitched(params: Params, start: Path, end: Path) -> VisionTransformer:
    """Load the encoder, with the upper blocks that the policy asks for."""
    check_encoder_fits(start, params.model, params.data)
    encoder = load_encoder(start)
    kept = params.graft.cut("scratch_end")
    if kept is not None:
        anew = build_encoder(params.model, params.data)
        init_encoder_as_moco(anew)
        replace_upper(encoder, anew, kept)
    kept = params.graft.cut("cl_end")
    if kept is not None:
        check_encoder_fits(end, params.model, params.data)
        replace_upper(encoder, load_encoder(end), kept)
    return encoder


def graft_rates(model: Contrastive, graft: GraftParams, depth: int) -> dict[str, float]:
    """Return parameter name → peak learning rate, of the one policy that gives rates."""
    names = [name for name, _ in model.named_parameters()]
    if graft.stage_lr and "stage_lr" in graft.policy:
        return stage_rates(names, depth, [peak_rate(lr, graft.batch_size) for lr in graft.stage_lr.base_lrs])
    assert graft.layer_decay is not None  # the parameters are checked
    return decayed_rates(names, depth, peak_rate(graft.layer_decay.base_lr, graft.batch_size), graft.layer_decay.decay)
