"""The losses of the first five steps of every training, in single precision on one thread.

A change of the losses is either a fault, or meant. A change that is meant is written anew, and told in the changelog:
`python -m pytest tests/pretrain/test_golden.py --write-golden`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from arrivals import ARMS, Arrivals, Coloured, arriving

from lgp.evaluate.fine_tuning import finetune
from lgp.evaluate.linear import evaluate_linear_augmented
from lgp.features.cache import FeatureCache
from lgp.features.extraction import ALONE
from lgp.features.of_encoder import encoder_source
from lgp.params.evaluate import FeatureParams

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS, TOLERANCE = 5, 1e-4
CPU = torch.device("cpu")
TUNED: dict[str, dict[str, Any]] = {
    "finetune": {"label_smoothing": 0.1, "flip_p": 0.5, "drop_path": 0.1},
    "finetune_augmented": {
        "drop_path": 0.2, "rand_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "mixup": 0.8, "cutmix": 1.0,
        "pool": "average",
    },
}  # fmt: skip


def tune(name: str, coloured: Coloured, folder: Path) -> None:
    """Fine-tune the first encoder with all labels."""
    recipe = {"epochs": 3, "warmup_epochs": 1, "batch_size": 12, "base_lr": 0.5, "layer_decay": 0.75} | TUNED[name]
    session = coloured.session({"finetune": {"10pct": recipe}}, folder)
    finetune(coloured.mim.parent, coloured.data, coloured.data.labelled("all"), session.params.recipe("10pct"), session)


def probe(coloured: Coloured, folder: Path) -> None:
    """Train the linear probe on random crops of the first encoder."""
    linear = {"method": "augmented", "flip_p": 0.5, "epochs": 3, "batch_size": 12, "base_lrs": [0.1, 1, 10]}
    session = coloured.session({"linear": linear}, folder)
    source = encoder_source(coloured.mim, FeatureParams(), ALONE)
    features = FeatureCache(folder / "cache", FeatureParams(), 1.0).features(source, coloured.data)
    evaluate_linear_augmented(features, coloured.mim, coloured.data, session, CPU)


def losses_of(name: str, recorded: Callable[[str], Arrivals], coloured: Coloured, folder: Path) -> list[float]:
    """Return the first losses of a training."""
    if name in ARMS:
        return [step.loss for step in recorded(name).steps[:STEPS]]
    with arriving(STEPS) as trainings:
        probe(coloured, folder) if name == "linear" else tune(name, coloured, folder)
    return [step.loss for step in trainings[0].steps]


@pytest.mark.parametrize("name", [*ARMS, *TUNED, "linear"])
def test_first_losses_are_the_golden_ones(
    name: str,
    recorded: Callable[[str], Arrivals],
    coloured: Coloured,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    losses, golden = losses_of(name, recorded, coloured, tmp_path), json.loads(GOLDEN.read_text())
    if request.config.getoption("--write-golden"):
        GOLDEN.write_text(json.dumps(golden | {name: [float(f"{loss:.7g}") for loss in losses]}, indent=1) + "\n")
    else:
        assert losses == pytest.approx(golden[name], rel=TOLERANCE)
