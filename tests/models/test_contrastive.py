"""The contrastive models get the parameters of their objective."""

from typing import Any

import pytest

from lgp.models.contrastive import build_contrastive
from lgp.models.moco import MaskedKeysMoCo, MoCo, OneSidedMoCo
from lgp.models.refine import Refine
from lgp.models.simclr import SimCLR
from lgp.models.swav import SwAV
from lgp.models.vicreg import VICReg
from lgp.models.vit import build_encoder
from lgp.params.file import Params
from lgp.params.pretrain import RefineParams, SwavParams, VicregWeights


def built(params: Params, **changes: Any) -> Any:
    return build_contrastive(build_encoder(params.model, params.data), params.contrastive.model_copy(update=changes))


def test_each_objective_gets_its_own_settings(params: Params) -> None:
    moco = built(params, temperature=0.3, momentum=0.7)
    assert (type(moco), moco.temperature, moco.momentum) == (MoCo, 0.3, 0.7)
    simclr = built(params, objective="simclr", temperature=0.4)
    assert (type(simclr), simclr.temperature) == (SimCLR, 0.4)
    weights = VicregWeights(invariance=3.0)
    vicreg = built(params, objective="vicreg", vicreg=weights)
    assert (type(vicreg), vicreg.weights) == (VICReg, weights)
    swav = built(params, objective="swav", temperature=0.5, swav=SwavParams(prototypes=7))
    assert (type(swav), swav.temperature, swav.params.prototypes) == (SwAV, 0.5, 7)
    of_refine = params.contrastive.model_copy(
        update={"objective": "refine", "temperature": 0.6, "refine": RefineParams(queue=64)}
    )
    for images, places in ((None, 64), (100, 50)):
        refine = build_contrastive(build_encoder(params.model, params.data), of_refine, images)
        assert isinstance(refine, Refine)
        assert (refine.temperature, len(refine._heads()[0].queue.ids)) == (0.6, places)


@pytest.mark.parametrize(
    ("masked", "kind"), [("queries", MoCo), ("queries_and_keys", MaskedKeysMoCo), ("one_sided", OneSidedMoCo)]
)
def test_the_mask_variant_chooses_the_model(masked: str, kind: type[MoCo], params: Params) -> None:
    assert type(built(params, masked=masked)) is kind
