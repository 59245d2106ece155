"""Where to cut an arm for a graft, and at what rate the lower blocks go on to learn.

The cut comes from the conflict of the gradients and from the features after each block. The rate comes from the length
of the MIM. The paper grafts on a MAE of 1,600 epochs and keeps the lower blocks almost as they are. After a short one
they still have to learn.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from lgp.compute.device import choose_device
from lgp.compute.intact import reading
from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.features.extraction import Running, extract
from lgp.features.knn import knn_predict
from lgp.models.encoder_folder import images_for, load_encoder
from lgp.models.files import encoder_digest, read_provenance
from lgp.models.vit import tokens_by_block
from lgp.params.file import Params
from lgp.params.graft import GraftParams

KNN_IMAGES = 10_000  # of the training part: k-NN per block is a guide, not a result
PAPER_RATIO = 0.1  # of the rate of the lower blocks to that of the upper ones
LONG_MIM = 1_000  # epochs: between 480, where the paper's ratio lost on digits, and 1,920 (docs/experiments.md)


def knn_by_block(folder: Path, data: LabelledImages, params: Params) -> list[float]:
    """Return k-NN accuracy on val, in percent, of the mean token after each block of the encoder in `folder`."""
    data = images_for(folder, data)
    device = choose_device(params.run)
    encoder = load_encoder(folder).to(device).eval()

    def encode(images: Tensor) -> Tensor:
        return torch.cat([t.mean(dim=1) for t in tokens_by_block(encoder, images.to(device))], dim=1)

    train = data.ids("train")
    train = train[:: math.ceil(len(train) / KNN_IMAGES)]
    val = data.ids("val")
    running = Running.of(params.run, device)
    of_splits = (extract(encode, data, ids, running=running) for ids in (train, val))
    x_train, x_val = (np.split(features, len(encoder.blocks), axis=1) for features in of_splits)
    k, temperature, classes = params.linear.knn_k, params.linear.knn_temperature, len(data.classes)
    predicted = [
        knn_predict(of_train, data.labels[train], of_val, classes, k, temperature)
        for of_train, of_val in zip(x_train, x_val, strict=True)
    ]
    return [round(100 * float((p == data.labels[val]).mean()), 2) for p in predicted]


@dataclass(frozen=True)
class Suggestion:
    """How many lower blocks to keep for a graft, and why.

    Attributes:
        lower_blocks: the suggestion.
        by_conflict: number of blocks below the fall of the median cosine; None where it does not fall with depth.
        by_knn: number of blocks up to and including the one with the best features.
        cosines: median cosine per block.
    """

    lower_blocks: int
    by_conflict: int | None
    by_knn: int
    cosines: list[float]


def suggest_cut(conflict: pd.DataFrame, knn: list[float]) -> Suggestion:
    """Suggest how many lower blocks to keep.

    The cut by conflict splits the blocks' median cosines into the two levels that fit them best (least squares).
    Conflict grows with depth where the upper level is lower by more than three standard errors over the batches. This
    cut is then the suggestion. Otherwise the cut by k-NN is: keep the blocks up to and including the one with the best
    k-NN accuracy. The last block is never kept.

    Args:
        conflict: of `measure_conflict`.
        knn: accuracy per block of the encoder to graft on, two blocks or more.

    Raises:
        LgpError: the conflict was measured in another number of blocks, or there are fewer than two.
    """
    names = [f"block{i}" for i in range(len(knn))]
    blocks = conflict[conflict["block"].str.startswith("block")]
    by_batch = blocks.pivot(index="batch", columns="block", values="cosine")
    if set(by_batch.columns) != set(names) or len(knn) < 2:
        raise LgpError(
            f"the conflict was measured in {len(by_batch.columns)} blocks, the encoder has {len(knn)} (two or more are "
            "needed): run `lgp conflict` again"
        )
    cosines = by_batch[names].median().to_numpy()

    def misfit(cut: int) -> float:
        return float(sum(((part - part.mean()) ** 2).sum() for part in (cosines[:cut], cosines[cut:])))

    cut = min(range(1, len(cosines)), key=misfit)
    fall = by_batch[names[:cut]].to_numpy().mean(axis=1) - by_batch[names[cut:]].to_numpy().mean(axis=1)
    falls = bool(fall.mean() > 3 * fall.std(ddof=1) / math.sqrt(len(fall)))
    by_knn = min(int(np.argmax(knn)) + 1, len(knn) - 1)
    return Suggestion(cut if falls else by_knn, cut if falls else None, by_knn, [float(c) for c in cosines])


def rates_for(lower_blocks: int, depth: int, low: float, high: float) -> list[float]:
    """Return `graft.stage_lr.base_lrs` that give the lower blocks the rate `low`, the others `high`."""
    group = math.gcd(lower_blocks, depth)
    return [low] * (lower_blocks // group) + [high] * ((depth - lower_blocks) // group)


def read_conflict(path: Path, encoder: Path) -> pd.DataFrame:
    """Read a table of `measure_conflict`; raise `LgpError` where it is missing or of another encoder."""
    arm = encoder.parent.name
    if not path.exists():
        raise LgpError(f"no {path}: run `lgp conflict {arm}` first")
    with reading(path, f"run `lgp conflict {arm}`"):
        table = pd.read_csv(path).astype({"batch": int, "cosine": float})[["encoder", "block", "batch", "cosine"]]
    if set(table["encoder"]) != {encoder_digest(encoder)}:
        raise LgpError(f"{path} was measured on another encoder of {arm}: run `lgp conflict {arm}` again")
    return table


def mim_epochs(folder: Path) -> int | None:
    """Return the epochs of the MIM that trained the encoder in `folder`; None where `lgp mim` did not train it."""
    provenance = read_provenance(folder)
    epochs: int | None = provenance.get("metrics", {}).get("train/epochs")
    return epochs if provenance.get("stage") == "mim" else None


def advice(found: Suggestion, arm: str, depth: int, graft: GraftParams, epochs: int | None) -> list[str]:
    """Write a suggestion as lines of text. The keys of `graft` to try first come first.

    Args:
        found: of `suggest_cut`.
        arm: to graft on.
        depth: number of blocks.
        graft: whose highest rate stays, for the upper blocks and the heads.
        epochs: of the arm's MIM; None where it is not known.
    """
    cut, rate = found.lower_blocks, _highest_rate(graft)
    why = "conflict grows there" if found.by_conflict else "conflict does not grow with depth, k-NN decides"
    one_rate = _section(arm, {"stage_lr": {"base_lrs": [rate]}}) + "  # one rate for all blocks"
    # rounded, since 0.1 * 1.6e-3 is 0.00016000000000000001
    tenth = {"stage_lr": {"base_lrs": rates_for(cut, depth, float(f"{PAPER_RATIO * rate:.6g}"), rate)}}
    frozen = {"stage_lr": {"base_lrs": [rate]}, "freeze": {"lower_blocks": cut}}
    held = [
        _section(arm, tenth) + "  # the lower blocks at a tenth, as in the paper",
        _section(arm, frozen) + "  # the lower blocks frozen",
    ]
    if epochs is None:
        said = f"`lgp mim` did not train {arm}, so how long its MIM was is not known"
    else:
        compared = f"fewer than {LONG_MIM:,}" if epochs < LONG_MIM else f"{LONG_MIM:,} or more"
        said = f"the MIM of {arm} had {epochs:,} epochs, {compared}"
    short = epochs is not None and epochs < LONG_MIM
    return [
        f"the lower blocks are the lowest {cut} of {depth} ({why}; k-NN is best after {found.by_knn})",
        f"{said}. Compare these keys of `graft` on val, in this order (docs/grafts.md):",
        *([one_rate, *held] if short else [*held, one_rate]),
    ]


def _section(arm: str, policies: Mapping[str, Any]) -> str:
    """Write keys of the section `graft` on one line of YAML."""
    section = {"start": arm, "end": arm, "policy": list(policies), **policies}
    text: str = yaml.safe_dump({"graft": section}, default_flow_style=True, sort_keys=False, width=math.inf)
    return f"  {text.strip()[1:-1]}"


def _highest_rate(graft: GraftParams) -> float:
    if graft.stage_lr and "stage_lr" in graft.policy:
        return max(graft.stage_lr.base_lrs)
    assert graft.layer_decay is not None  # a policy names exactly one of stage_lr and layer_decay
    return graft.layer_decay.base_lr
