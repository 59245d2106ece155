"""Predictions of a kept classifier: the same as plain timm's, for any source, and no file is lost."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config

from lgp.data import squares as squares_module
from lgp.data.normalization import Normalization
from lgp.data.sources.folder import folder_source
from lgp.data.sources.opening import open_sources
from lgp.data.squares import Form, squares
from lgp.data.table_writing import table_writer
from lgp.errors import LgpError
from lgp.evaluate.prediction import find_classifier, kept_classifiers, predictions
from lgp.features.of_source import embeddings, form_of
from lgp.models.classifier_folder import Classifier, Head, load_classifier, save_classifier
from lgp.models.encoder_folder import save_encoder
from lgp.models.files import CONFIG, PROVENANCE, encoder_digest
from lgp.models.vit import build_encoder
from lgp.params.file import Params

CPU = torch.device("cpu")
CLASSES = ["ant", "bee", "wasp"]
SIZE = 16


@pytest.fixture
def models(tmp_path: Path, params: Params) -> Path:
    """An arm with an encoder of colour images, and two classifiers."""
    data = params.data.model_copy(update={"image_size": SIZE, "channels": 3, "eval_crop": 0.9})
    model = params.model
    torch.manual_seed(0)
    arm = tmp_path / "models" / "graft"
    statistics = Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    save_encoder(arm / "encoder", build_encoder(model, data), model, data, statistics, {})
    for number, (task, val) in enumerate((("fewshot-1pct", 50.0), ("linear", 80.0))):
        rng = np.random.default_rng(number)
        head = Head(rng.normal(size=(3, model.width)), rng.normal(size=3))
        metrics = {"val/top1": val, "labels": 10.0, "encoder": encoder_digest(arm / "encoder")}
        save_classifier(
            arm / "classifiers" / task, arm / "encoder", Classifier(1.0, head), CLASSES, {"metrics": metrics}
        )
    return tmp_path / "models"


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of images of several sizes, one turned, with damaged and other files among them."""
    folder, rng = tmp_path / "photographs", np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    for i in range(9):
        image = Image.fromarray(rng.integers(0, 256, (20 + 3 * i, 40 - 2 * i, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        image.save(folder / f"deep/{i}.jpg" if i % 2 else folder / f"{i}.jpg", exif=exif)
    (folder / "cut.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


def all_rows(classifier: Path, source: Path) -> pd.DataFrame:
    tables = predictions(load_classifier(classifier, CPU), open_sources([str(source)]), CPU)
    return pd.concat(list(tables), ignore_index=True)


@torch.inference_mode()
def test_probabilities_are_those_of_plain_timm(models: Path, photographs: Path) -> None:
    folder = models / "graft" / "classifiers" / "linear"
    rows = all_rows(folder, photographs).set_index("path")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    for path in photographs.rglob("[0-9].jpg"):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        probabilities = model(transform(image)[None]).softmax(1)[0].numpy()
        first, second = np.argsort(-probabilities)[:2]
        row = rows.loc[str(path.relative_to(photographs))]
        assert (row["class"], row["runner_up"]) == (CLASSES[first], CLASSES[second])
        assert row["probability"] == pytest.approx(probabilities[first], abs=1e-5)
        assert row["margin"] == pytest.approx(probabilities[first] - probabilities[second], abs=2e-5)
        assert row["reason"] == ""


def test_classifier_without_provenance_predicts_too(models: Path, photographs: Path) -> None:
    """As `lgp export` writes one for the Hub."""
    folder = models / "graft" / "classifiers" / "linear"
    (folder / PROVENANCE).unlink()
    assert len(all_rows(find_classifier(models, str(folder)), photographs)) == 12


def test_every_file_has_a_row(models: Path, photographs: Path) -> None:
    rows = all_rows(models / "graft" / "classifiers" / "linear", photographs).set_index("path")
    assert len(rows) == 12
    assert rows.loc["empty.png", "reason"] == "empty"
    assert "damaged" in rows.loc["cut.jpg", "reason"]
    assert rows.loc["notes.txt", "reason"].startswith("no image by its name")
    assert rows.loc[["empty.png", "cut.jpg", "notes.txt"], ["class", "probability"]].isna().all(axis=None)


def test_processes_give_the_same_squares_in_order(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form(3, SIZE, 17, "bicubic")
    offers = folder_source(photographs)
    alone = [image for chunk in squares(offers, form) for image in chunk]
    monkeypatch.setattr(squares_module, "FEW", 0)
    monkeypatch.setattr(squares_module, "CHUNK", 2)
    together = [image for chunk in squares(offers, form, workers=2) for image in chunk]
    assert len(alone) == len(together) == 11
    for one, other in zip(alone, together, strict=True):
        assert one == other if isinstance(one, str) else np.array_equal(one, other)


def test_best_on_val_is_the_default_and_stale_ones_do_not_count(models: Path) -> None:
    arm = models / "graft"
    assert find_classifier(models, None) == arm / "classifiers" / "linear"
    assert find_classifier(models, "graft/fewshot-1pct") == arm / "classifiers" / "fewshot-1pct"
    assert find_classifier(models, str(arm / "classifiers" / "linear")) == arm / "classifiers" / "linear"
    with pytest.raises(LgpError, match="no classifier 'graft/other': there are graft/linear, graft/fewshot-1pct"):
        find_classifier(models, "graft/other")
    file = arm / "classifiers" / "linear" / PROVENANCE
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"metrics": record["metrics"] | {"encoder": "another"}}))
    assert [kept.name for kept in kept_classifiers(models)] == ["graft/fewshot-1pct"]
    with pytest.raises(
        LgpError, match="graft/linear is of another encoder than its arm has now: evaluate the arm again"
    ):
        find_classifier(models, "graft/linear")
    (arm / "encoder" / "model.safetensors").unlink()
    with pytest.raises(LgpError, match="there is no classifier yet"):
        find_classifier(models, None)


def test_of_equal_accuracies_on_val_the_better_probabilities_win(models: Path) -> None:
    def record(task: str, **metrics: float) -> None:
        file = models / "graft" / "classifiers" / task / PROVENANCE
        of_task = json.loads(file.read_text())
        file.write_text(json.dumps(of_task | {"metrics": of_task["metrics"] | metrics}))

    record("linear", **{"val/top1": 100.0, "val/brier": 0.8, "labels": 144})
    record("fewshot-1pct", **{"val/top1": 100.0, "val/brier": 0.1, "labels": 10})
    assert [kept.name for kept in kept_classifiers(models)] == ["graft/fewshot-1pct", "graft/linear"]
    record("linear", **{"val/brier": 0.1})
    assert [kept.name for kept in kept_classifiers(models)] == ["graft/linear", "graft/fewshot-1pct"]


def test_squares_are_those_that_timm_cuts(models: Path) -> None:
    config = json.loads((models / "graft" / "classifiers" / "linear" / CONFIG).read_text())
    assert form_of(config) == Form(3, 16, 17, "bilinear")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_table_appears_when_it_is_whole(tmp_path: Path, name: str) -> None:
    first = pd.DataFrame({"path": ["a"], "class": [None]}).astype("string")
    second = pd.DataFrame({"path": ["b, c"], "class": ["ant"]}).astype("string")
    with table_writer(tmp_path / name) as write:
        write(first)
        write(second)
        assert not (tmp_path / name).exists()
    table = pd.read_csv(tmp_path / name) if name.endswith("csv") else pd.read_parquet(tmp_path / name)
    assert table["path"].tolist() == ["a", "b, c"]
    assert table["class"].isna().tolist() == [True, False]
    with pytest.raises(AttributeError), table_writer(tmp_path / name) as write:
        write("no table")  # type: ignore[arg-type]
    assert len(list(tmp_path.iterdir())) == 1


def test_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match=r"give a name that ends in .csv or .parquet"), table_writer(tmp_path / "t.xlsx"):
        pass
    with pytest.raises(LgpError, match="is no folder: make it first"), table_writer(tmp_path / "x" / "t.csv"):
        pass


def test_parquet_without_a_row_is_said(tmp_path: Path) -> None:
    with pytest.raises(LgpError, match="no image can be read"), table_writer(tmp_path / "t.parquet"):
        pass
    assert not list(tmp_path.iterdir())


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_are_the_encoders_features(models: Path, photographs: Path, params: Params, dtype: str) -> None:
    encoder = models / "graft" / "encoder"
    tables = embeddings(encoder, open_sources([str(photographs)]), params.features, CPU, dtype)
    table = pd.concat(list(tables), ignore_index=True)
    assert sorted(table["path"]) == sorted(str(p.relative_to(photographs)) for p in photographs.rglob("[0-9].jpg"))
    model = timm.create_model(f"local-dir:{encoder}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    for path, features in zip(table["path"], table["features"], strict=True):
        image = ImageOps.exif_transpose(Image.open(photographs / path)).convert("RGB")
        expected = model(transform(image)[None])[0].numpy()
        assert features.dtype == dtype
        assert np.abs(features - expected).max() < (1e-5 if dtype == "float32" else 5e-3)
