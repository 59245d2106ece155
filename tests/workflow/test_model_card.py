"""Folders for the Hugging Face Hub: timm loads them, and the card says what is known of the model, and no more."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from made_models import CLASSES, by_timm, make_classifier, make_encoder
from PIL import Image

from lgp.errors import LgpError
from lgp.models.files import CONFIG, PROVENANCE, WEIGHTS, encoder_digest
from lgp.workflow.model_card import export_hub_folder

PROVENANCE_OF_GRAFT = {
    "arm": "graft",
    "params": {"data": {"source": "secret/photos"}, "graft": {"epochs": 7, "start": "mim", "policy": ["l1"]}},
    "digests": {"inputs": {"data/prepared": "abc123"}},
    "lgp": "0.1.0",
    "commit": "c0ffee",
    "dirty": True,
    "metrics": {"trained": True},
}


@pytest.fixture
def graft(tmp_path: Path) -> Path:
    """An encoder folder with provenance and metrics: two of its own, and one of an encoder that it replaced."""
    encoder = make_encoder(tmp_path / "models/graft/encoder", 3)
    (encoder / PROVENANCE).write_text(json.dumps(PROVENANCE_OF_GRAFT))
    own = {"encoder": encoder_digest(encoder), "labels": 10.0, "subsets": 5.0}
    write_metrics(tmp_path, "graft-fewshot-1pct", own | interval(74.71, 64.81, 82.57))
    write_metrics(tmp_path, "graft-linear", own | {"labels": 1295.0, "subsets": 1.0} | interval(95.8, 93.2, 97.5))
    write_metrics(tmp_path, "graft-finetune-10pct", own | {"encoder": "another"} | interval(11.1, 10.0, 12.0))
    write_metrics(tmp_path, "mim-linear", own | interval(22.2, 20.0, 24.0))
    write_metrics(
        tmp_path, "prepare", {"images/train": 1295, "images/val": 143, "images/test": 359, "digest": "abc123"}
    )
    return encoder


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"test/top1": mean, "test/top1_low": low, "test/top1_high": high}


def write_metrics(folder: Path, name: str, values: dict[str, Any]) -> None:
    (folder / "metrics").mkdir(exist_ok=True)
    (folder / f"metrics/{name}.json").write_text(json.dumps(values))


def card_of(folder: Path, tmp_path: Path) -> tuple[str, Path]:
    """Export a model, and return the text of its card and the folder."""
    target = tmp_path / "hub"
    target.parent.mkdir(exist_ok=True)
    export_hub_folder(folder, target, tmp_path / "metrics")
    return (target / "README.md").read_text(encoding="utf-8"), target


def test_folder_is_what_timm_loads_and_holds_nothing_else(graft: Path, tmp_path: Path) -> None:
    _, folder = card_of(graft, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, WEIGHTS]
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(by_timm(folder, images), by_timm(graft, images))


def test_card_of_an_encoder_has_its_head_facts_and_own_metrics(graft: Path, tmp_path: Path) -> None:
    text, _ = card_of(graft, tmp_path)
    data = ModelCard(text).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("timm", "unknown", "image-feature-extraction")
    assert {"timm", "image-feature-extraction", "layer-grafted-pretraining"} <= set(data.tags)
    for row in (
        "| arm | graft |",
        "| epochs | 7 |",
        "| started from | mim |",
        "| policy | l1 |",
        "| architecture | ViT, width 16, depth 1, 2 heads |",
        "| prepared images | 1295 train, 143 val, 359 test; digest `abc123` |",
        "| code | lgp 0.1.0, commit c0ffee, with changes that are not committed |",
        "| logistic regression on frozen features (1pct) | 10 | 74.7 [64.8, 82.6] | 5 |",
        "| linear probe | 1295 | 95.8 [93.2, 97.5] | 1 |",
    ):
        assert row in text.splitlines()
    parameters = sum(p.numel() for p in timm.create_model(f"local-dir:{graft}", pretrained=True).parameters())
    assert f"| parameters | {parameters:,} |" in text
    assert "11.1" not in text  # of the encoder that this one replaced
    assert "22.2" not in text  # of another arm
    assert "secret" not in text


def test_card_of_a_classifier_has_its_classes_and_its_own_task(graft: Path, tmp_path: Path) -> None:
    text, folder = card_of(make_classifier(graft.parent / "classifiers/linear", graft), tmp_path)
    data = ModelCard(text).data
    assert (data.pipeline_tag, data.library_name) == ("image-classification", "timm")
    assert f"| classes | {', '.join(CLASSES)} |" in text
    assert "95.8 [93.2, 97.5]" in text
    assert "74.7" not in text
    assert json.loads((folder / CONFIG).read_text())["label_names"] == CLASSES


def test_names_of_many_classes_are_not_listed_and_a_bar_does_not_end_a_cell(graft: Path, tmp_path: Path) -> None:
    classifier = make_classifier(graft.parent / "classifiers/linear", graft)
    config = json.loads((classifier / CONFIG).read_text())
    for names, shown in (
        (["a|b", *CLASSES[1:]], "a&#124;b, bee, cat, dog, élan"),
        (["x"] * 21, "21, named in config.json"),
    ):
        (classifier / CONFIG).write_text(json.dumps(config | {"label_names": names}))
        assert f"| classes | {shown} |" in card_of(classifier, tmp_path / shown[:2])[0]


def test_numbers_of_other_images_are_not_given(graft: Path, tmp_path: Path) -> None:
    write_metrics(tmp_path, "prepare", {"images/train": 5, "images/val": 1, "images/test": 1, "digest": "other"})
    assert "| prepared images | digest `abc123` |" in card_of(graft, tmp_path)[0]


def test_card_of_an_unknown_model_says_so(tmp_path: Path) -> None:
    encoder = make_encoder(tmp_path / "mine", 2)
    (encoder / PROVENANCE).unlink()
    text, _ = card_of(encoder, tmp_path)
    assert "It is not known where the encoder comes from." in text
    assert "No metrics of this encoder were found." in text
    assert "| code | unknown |" in text
    assert "torch.zeros(1, 2, 8, 8)" in text


def test_card_warns_of_an_encoder_that_did_not_train(graft: Path, tmp_path: Path) -> None:
    checks = {"faults": {"std": "the features collapsed"}, "accepted": True}
    provenance = PROVENANCE_OF_GRAFT | {"metrics": {"trained": False}, "checks": checks}
    (graft / PROVENANCE).write_text(json.dumps(provenance))
    classifier = make_classifier(graft.parent / "classifiers/linear", graft)
    assert "**Warning: the arm graft did not train (std), and was accepted.**" in card_of(classifier, tmp_path)[0]
    (graft / PROVENANCE).write_text(json.dumps(provenance | {"checks": checks | {"accepted": False}}))
    with pytest.raises(LgpError, match="the arm graft did not train"):
        export_hub_folder(classifier, tmp_path / "again", tmp_path / "metrics")


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_code_of_the_card_runs(
    kind: str, graft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = graft if kind == "encoder" else make_classifier(graft.parent / "classifiers/linear", graft)
    text, hub = card_of(folder, tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", format="PNG")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("hf-hub:USER/NAME", f"local-dir:{hub}"), names)
    statistics = json.loads((graft / CONFIG).read_text())["pretrained_cfg"]
    mean, std = (torch.tensor(statistics[key]).view(-1, 1, 1) for key in ("mean", "std"))
    expected = by_timm(folder, ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None])
    if kind == "encoder":
        torch.testing.assert_close(names["features"], expected)
        return
    probabilities = expected.softmax(dim=1)
    torch.testing.assert_close(names["probabilities"], probabilities)
    assert capsys.readouterr().out.startswith(
        f"{CLASSES[probabilities[0].argmax()]} {probabilities.max().item():.3f}"[:8]
    )
