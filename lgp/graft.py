"""The graft: contrastive learning continues on the MAE encoder, lower blocks slower (LGP, section 3.3)."""

import re
from pathlib import Path

from lgp.checkpoint import check_encoder_fits, load_encoder
from lgp.cl import build_moco, contrast
from lgp.errors import LgpError
from lgp.optim import peak_rate
from lgp.pretrain import Pretrained, Session
from lgp.randomness import seeded

BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def stage_rates(parameter_names: list[str], depth: int, rates: list[float]) -> dict[str, float]:
    """Give each parameter of the contrastive model its learning rate (LGP, section 3.3).

    The blocks are cut into equal groups, one rate each, from the lowest; what comes before the blocks
    (class token, patch embedding) takes the first rate, the final norm and the heads the last.

    Args:
        parameter_names: as of `MoCo`: `encoder.…`, `projector.…`, `predictor.…`.
        depth: number of blocks.
        rates: one per group; the paper's are 1.5e-5, 1.5e-5, 1.5e-4 per 256 images.

    Returns:
        name → rate.

    Raises:
        LgpError: the groups are not equal.
    """
    if depth % len(rates):
        raise LgpError(
            f"{depth} blocks cannot be cut into {len(rates)} equal groups: give rates whose number divides it"
        )
    per_group = depth // len(rates)

    def rate(name: str) -> float:
        block = BLOCK.search(name)
        if block:
            return rates[int(block.group(1)) // per_group]
        below = name.startswith(("encoder.cls_token", "encoder.pos_embed", "encoder.patch_embed"))
        return rates[0] if below else rates[-1]

    return {name: rate(name) for name in parameter_names}


def pretrain_graft(session: Session, mim_encoder: Path) -> Pretrained:
    """Continue MoCo v3 from the MAE encoder, lower blocks slower (LGP, section 3.3).

    Encoder and momentum encoder both start as the encoder in the folder `mim_encoder`, the heads anew.
    """
    params = session.params
    check_encoder_fits(mim_encoder, params.model, params.data)
    with seeded(params.seed, "graft/init"):
        moco = build_moco(load_encoder(mim_encoder), params)
    peaks = [peak_rate(lr, params.graft.batch_size) for lr in params.graft.stage_base_lrs]
    rates = stage_rates([name for name, _ in moco.named_parameters()], params.model.depth, peaks)
    return contrast("graft", moco, rates, params.graft, session)
