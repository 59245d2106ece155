"""Where to cut: from the conflict, from k-NN after each block and from the length of the MIM."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from arrivals import saved_encoder
from conftest import FOREIGN

from lgp.data.labels import LabelledImages
from lgp.errors import LgpError
from lgp.features.extraction import extract, features_of
from lgp.features.knn import knn_predict
from lgp.models.contrastive import build_contrastive
from lgp.models.encoder_folder import load_encoder, save_texts
from lgp.models.files import encoder_digest
from lgp.models.vit import build_encoder, tokens_by_block
from lgp.params.file import Params
from lgp.pretrain.cut import advice, knn_by_block, mim_epochs, rates_for, read_conflict, suggest_cut
from lgp.pretrain.graft import graft_rates


@pytest.fixture
def start(tmp_path: Path, params: Params, prepared: LabelledImages) -> Path:
    return saved_encoder(tmp_path / "mim" / "encoder", params, prepared, 1)


def test_knn_by_block_is_of_images_with_the_encoders_statistics(
    prepared: LabelledImages, params: Params, foreign_folder: Path
) -> None:
    foreign = prepared.normalized_by(FOREIGN)
    found, expected = (knn_by_block(foreign_folder, data, params) for data in (prepared, foreign))
    assert found == expected


def test_knn_by_block_is_knn_of_each_blocks_mean_token(prepared: LabelledImages, params: Params, start: Path) -> None:
    data, encoder = prepared, load_encoder(start).eval()
    train, val = data.ids("train"), data.ids("val")
    with torch.inference_mode():
        x = [tokens_by_block(encoder, data.normalize(data.whole(i)))[1].mean(dim=1).numpy() for i in (train, val)]
    predicted = knn_predict(x[0], data.labels[train], x[1], 10, 20, 0.07)
    expected = 100 * (predicted == data.labels[val]).mean()
    assert knn_by_block(start, data, params)[1] == pytest.approx(expected, abs=0.01)
    assert extract(features_of(encoder, torch.device("cpu")), data, val).shape == (len(val), 16)


def cosines(values: list[float]) -> pd.DataFrame:
    rows = [(f"block{i}", batch, v + 0.01 * batch) for i, v in enumerate(values) for batch in range(-1, 2)]
    return pd.DataFrame([*rows, ("embed", 0, 0.0)], columns=["block", "batch", "cosine"])


def test_cut_is_where_the_cosine_falls() -> None:
    found = suggest_cut(cosines([0.3, 0.28, 0.31, 0.29, -0.1, -0.12]), [10, 20, 30, 40, 50, 60])
    assert (found.lower_blocks, found.by_conflict, found.by_knn) == (4, 4, 5)
    assert found.cosines == pytest.approx([0.3, 0.28, 0.31, 0.29, -0.1, -0.12])


def test_without_growing_conflict_the_features_decide() -> None:
    found = suggest_cut(cosines([-0.1, -0.1, 0.2, 0.2]), [50, 70, 60, 40])
    assert (found.lower_blocks, found.by_conflict, found.by_knn) == (2, None, 2)
    assert suggest_cut(cosines([0.0] * 4), [10, 20, 30, 40]).lower_blocks == 3  # never all


def test_noise_is_no_conflict_that_grows() -> None:
    rng = np.random.default_rng(0)
    rows = [(f"block{i}", b, rng.normal()) for i in range(12) for b in range(50)]
    tables = [
        pd.DataFrame(rows, columns=["block", "batch", "cosine"]).assign(cosine=rng.normal(size=600)) for _ in range(40)
    ]
    assert sum(suggest_cut(table, [50.0] * 12).by_conflict is not None for table in tables) <= 2


def test_conflict_of_another_depth_is_refused() -> None:
    with pytest.raises(LgpError, match="measured in 4 blocks, the encoder has 6"):
        suggest_cut(cosines([0.0] * 4), [50.0] * 6)


@pytest.mark.parametrize(
    ("lower", "depth", "rates"),
    [(8, 12, [1, 1, 9]), (6, 12, [1, 9]), (5, 12, [1] * 5 + [9] * 7), (12, 12, [1]), (4, 6, [1, 1, 9])],
)
def test_suggested_rates_cut_where_asked(lower: int, depth: int, rates: list[float]) -> None:
    assert rates_for(lower, depth, 1, 9) == rates


def test_a_table_of_another_encoder_is_refused(
    prepared: LabelledImages, params: Params, start: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mim.csv"
    with pytest.raises(LgpError, match=r"no .*mim\.csv: run `lgp conflict mim` first"):
        read_conflict(path, start)
    cosines([0.1, 0.2]).assign(encoder=encoder_digest(start)).to_csv(path, index=False)
    assert read_conflict(path, start)["cosine"].tolist() == cosines([0.1, 0.2])["cosine"].tolist()
    saved_encoder(start, params, prepared, 2)
    with pytest.raises(LgpError, match=r"was measured on another encoder of mim: run `lgp conflict mim` again"):
        read_conflict(path, start)


ONE_RATE = [4e-3] * 6
TENTH = [4e-4] * 4 + [4e-3] * 2
LAYER_DECAY = {"base_lr": 4e-3, "decay": 0.75}
POLICIES: list[dict[str, Any]] = [
    {"policy": "stage_lr", "stage_lr": {"base_lrs": [4e-3, 1e-3]}},
    {"policy": "layer_decay", "layer_decay": LAYER_DECAY},
    {"policy": ["stage_lr", "freeze"], "stage_lr": {"base_lrs": [4e-3]}, "freeze": {"lower_blocks": 1}},
    {"policy": ["layer_decay", "lora"], "layer_decay": LAYER_DECAY, "lora": {"rank": 2, "alpha": 2, "free_blocks": 1}},
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("epochs", "short"), [(999, True), (1000, False), (None, False)])
def test_printed_sections_do_what_they_say_whatever_the_policy_was(
    policy: dict[str, Any], epochs: int | None, short: bool, values: dict[str, Any]
) -> None:
    """Each line is pasted over the section, and the rates of the blocks are read as the graft reads them."""
    before = {**values, "model": {**values["model"], "depth": 6}, "graft": {**values["graft"], **policy}}
    found = suggest_cut(cosines([0.3, 0.28, 0.31, 0.29, -0.1, -0.12]), [10, 20, 30, 40, 50, 60])
    _, _, *sections = advice(found, "other", 6, Params.model_validate(before).graft, epochs)
    done = []
    for line in sections:
        pasted = Params.model_validate(before | {"graft": before["graft"] | yaml.safe_load(line)["graft"]})
        assert (pasted.graft.start, pasted.graft.end) == ("other", "other")
        encoder = build_encoder(pasted.model, pasted.data)
        rates = graft_rates(build_contrastive(encoder, pasted.contrastive, 300), pasted.graft, 6)
        frozen = pasted.graft.cut("freeze") or 0
        of_blocks = [rates[f"encoder.blocks.{block}.norm1.weight"] for block in range(frozen, 6)]
        done.append([0.0] * frozen + [256 / pasted.graft.batch_size * rate for rate in of_blocks])
    held = [TENTH, [0.0] * 4 + [4e-3] * 2]
    assert done == pytest.approx(np.array([ONE_RATE, *held] if short else [*held, ONE_RATE]))


def test_advice_says_why(params: Params) -> None:
    grows = suggest_cut(cosines([0.3, 0.28, 0.31, 0.29, -0.1, -0.12]), [10, 20, 30, 40, 50, 60])
    flat = suggest_cut(cosines([-0.1, -0.1, 0.2, 0.2]), [50, 70, 60, 40])
    said = [
        ("the lower blocks are the lowest 4 of 6 (conflict grows there; k-NN is best after 5)", grows, 6),
        ("the lower blocks are the lowest 2 of 4 (conflict does not grow with depth, k-NN decides;", flat, 4),
    ]
    for line, found, depth in said:
        assert advice(found, "mim", depth, params.graft, 120)[0].startswith(line)
    lengths = {
        120: "the MIM of mim had 120 epochs, fewer than 1,000",
        1920: "the MIM of mim had 1,920 epochs, 1,000 or",
    }
    for epochs, line in lengths.items():
        assert advice(grows, "mim", 6, params.graft, epochs)[1].startswith(line)
    assert advice(grows, "cl", 6, params.graft, None)[1].startswith("`lgp mim` did not train cl, so how long")


def test_epochs_are_those_of_the_mim_that_trained_an_encoder(start: Path) -> None:
    assert mim_epochs(start) is None  # nothing is recorded
    for stage, metrics, epochs in (
        ("mim", {"train/epochs": 120}, 120),
        ("cl", {"train/epochs": 120}, None),
        ("import_checkpoint", {}, None),
    ):
        save_texts(start, {}, {"stage": stage, "metrics": metrics})
        assert mim_epochs(start) == epochs
