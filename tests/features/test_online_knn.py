"""Online k-NN: when it is measured, of what, and that it changes nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import merged

from lgp.data.labels import LabelledImages
from lgp.data.storage import Images
from lgp.evaluate.online_ridge import RIDGE, OnlineRidge
from lgp.features.extraction import extract, features_of
from lgp.features.knn import knn_predict
from lgp.features.online_knn import OnlineKnn, labels_if_any, nothing_more
from lgp.models.encoder_folder import load_encoder
from lgp.params.file import Params
from lgp.params.run import OnlineKnnParams
from lgp.pretrain.arm import Session
from lgp.pretrain.cl import pretrain_cl
from lgp.training.resume_states import StateStore

CPU = torch.device("cpu")


class Recorder:
    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def log_epoch(self, values: dict[str, float]) -> None:
        self.epochs.append(values)


def trained(
    values: dict[str, Any], data: Images, labelled: LabelledImages | None, folder: Path, every: int
) -> tuple[Any, Recorder]:
    changes = {"cl": {"epochs": 4}, "run": {"online_knn": {"every_epochs": every}}}
    told = Recorder()
    params = Params.model_validate(merged(values, changes))
    more = OnlineRidge(labelled, labelled.subsets("1pct"), params.fewshot) if labelled else nothing_more
    return pretrain_cl(Session(data, params, StateStore(folder, "code"), told, labelled, more)), told


def test_measured_every_so_many_epochs_and_the_encoder_is_the_same(
    values: dict[str, Any], prepared: LabelledImages, tmp_path: Path
) -> None:
    images = Images(prepared.folder)
    with_it, told = trained(values, images, prepared, tmp_path / "a", 2)
    others = [trained(values, images, prepared, tmp_path / "b", 0), trained(values, images, None, tmp_path / "c", 2)]
    for measure in ("val/online_knn_top1", RIDGE):
        assert [measure in epoch for epoch in told.epochs] == [False, True, False, True]
    for without, untold in others:
        assert len(untold.epochs) == 4
        assert not any({"val/online_knn_top1", RIDGE} & epoch.keys() for epoch in untold.epochs)
        other = without.model.encoder.state_dict()
        assert all(torch.equal(tensor, other[name]) for name, tensor in with_it.model.encoder.state_dict().items())


def test_it_is_knn_of_val_among_some_of_train(prepared: LabelledImages, encoder_folder: Path) -> None:
    encoder = load_encoder(encoder_folder)
    settings = OnlineKnnParams(every_epochs=1, train_images=10**6, val_images=10**6)
    found = OnlineKnn(prepared, settings).after_epoch(1, encoder, CPU)["val/online_knn_top1"]
    ids = {split: prepared.ids(split) for split in ("train", "val")}
    x = {split: extract(features_of(encoder, CPU), prepared, i) for split, i in ids.items()}
    labels = prepared.labels
    predicted = knn_predict(x["train"], labels[ids["train"]], x["val"], 10, 20, 0.07)
    assert found == round(100 * (predicted == labels[ids["val"]]).mean(), 2)
    some = OnlineKnn(prepared, OnlineKnnParams(train_images=50, val_images=5))
    assert len(set(labels[some.train])) == 10
    assert (len(some.train), len(some.val)) == (50, 5)


@pytest.mark.parametrize(
    ("empty", "said"),
    [
        ("val", "online k-NN is off: no val image is held out, so nothing can be evaluated"),
        ("train", "online k-NN is off: no training image has a label"),
    ],
)
def test_it_is_off_where_nothing_can_be_compared(
    prepared: LabelledImages, empty: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = prepared.folder, prepared._labels_folder
    assert labels_if_any(*folders) is not None
    ids = LabelledImages.ids
    none = np.zeros(0, dtype=np.int64)
    monkeypatch.setattr(LabelledImages, "ids", lambda self, part: none if part == empty else ids(self, part))
    assert labels_if_any(*folders) is None
    assert said in capsys.readouterr().out
