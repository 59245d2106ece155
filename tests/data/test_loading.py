"""Batches as a function of the step."""

import numpy as np
import pytest
import torch

from lgp.data.loading import StepCrops, loader
from lgp.data.prepared import Prepared
from lgp.params import ViewParams

VIEWS = ViewParams(crop_scale_min=0.4, flip_p=0.5)


def crops(prepared: Prepared, batch_size: int = 64, seed: int = 0) -> StepCrops:
    return StepCrops(prepared, VIEWS, 2, batch_size, seed, "cl")


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
def test_workers_give_the_same_batches(prepared: Prepared) -> None:
    alone = list(loader(crops(prepared), 2, 7, workers=0, pin=False))
    helped = list(loader(crops(prepared), 2, 7, workers=2, pin=False))
    assert len(alone) == 5
    assert alone[0].shape == (64, 2, 1, 8, 8)
    assert alone[0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_an_epoch_visits_every_image_at_most_once_in_a_new_order(prepared: Prepared) -> None:
    batches = crops(prepared)
    per_epoch = batches.steps_per_epoch
    epochs = [np.concatenate([batches.ids(e * per_epoch + s) for s in range(per_epoch)]) for e in (0, 1)]
    for ids in epochs:
        assert len(np.unique(ids)) == len(ids) == per_epoch * 64
        assert np.isin(ids, prepared.pretraining_ids).all()
    assert not np.array_equal(epochs[0], epochs[1])
