"""What any encoder must beat: raw pixels, and the same network with random weights."""

from collections.abc import Callable

import torch

from lgp.data.prepared import Prepared
from lgp.evaluate.features import Encode, Features, class_token_of, pixels
from lgp.evaluate.outcome import ArmResults
from lgp.evaluate.protocol import evaluate_fewshot, evaluate_linear
from lgp.models.vit import build_encoder, init_encoder_as_moco
from lgp.params import Params
from lgp.randomness import seeded


def _random_encoder(params: Params, device: torch.device) -> Encode:
    with seeded(params.seed, "random/init"):
        encoder = build_encoder(params.model, params.data)
        init_encoder_as_moco(encoder)
    return class_token_of(encoder, device)


BASELINES: dict[str, Callable[[Params, torch.device], Encode]] = {
    "pixels": lambda _params, _device: pixels,
    "random": _random_encoder,
}


def evaluate_baseline(name: str, data: Prepared, params: Params, device: torch.device) -> ArmResults:
    """Run the protocol, all shares of labels, on the baseline `name`: `pixels` or `random`."""
    features = Features.of(BASELINES[name](params, device), data)
    fewshot = {
        share: evaluate_fewshot(features, data.subsets(share), params.fewshot).metrics
        for share in params.data.few_label_shares
    }
    return ArmResults(name, evaluate_linear(features, params.linear).metrics, fewshot)
