"""`lgp select` as its users run it: choose, fill in, add the labels, choose again."""

import base64
import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import merged
from labelling import add_labels
from PIL import Image
from typer.testing import CliRunner, Result

from cli import app
from lgp.data.labels import LabelledImages
from lgp.data.preparation import prepare
from lgp.data.storage import Images
from lgp.features import cache as module
from lgp.models.encoder_folder import save_encoder, save_pixels
from lgp.models.files import encoder_digest
from lgp.params.file import load_params
from lgp.pretrain.baselines import baseline_encoder

CLASSES = ("ant", "bee")
PREPARED, LABELS, ENCODER = Path("data/prepared"), Path("data/labels"), Path("models/pixels/encoder")


def lgp(*command: str) -> Result:
    return CliRunner().invoke(app, list(command))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> Callable[..., LabelledImages]:
    """Makes a project of 60 images, of which some have a label in a table, with the arm `pixels`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)

    def project(labelled: int, **data: Any) -> LabelledImages:
        Path("raw").mkdir()
        for i in range(60):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(Path("raw") / f"bild, {i} <b>.png")
        rows = [f'"bild, {i} <b>.png",{CLASSES[i % 2]}' for i in range(labelled)]
        Path("first.csv").write_text("\n".join(["bild,art", *rows]))
        columns = {"image": "bild", "label": "art"}
        source = {"source": "raw", "max_train_images": None, "columns": columns}
        Path("params.yaml").write_text(yaml.safe_dump(merged(values, {"data": source | data})))
        params = load_params(Path("params.yaml"))
        PREPARED.mkdir(parents=True)
        prepare(params.data, params.seed, PREPARED, Path("held_out.csv"))
        save_pixels(ENCODER, Images(PREPARED), {})
        return add_labels()

    return project


def rows_of(file: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(file).read_text())))


def test_selection_is_filled_in_and_comes_back_as_labels(
    start: Callable[..., LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = start(40, labels=["first.csv"])
    result = lgp("select", "--budget", "12", "--arm", "pixels")
    assert result.exit_code == 0, result.output
    assert "12 of 20 unlabelled training images, by typicality of the features of pixels" in result.output
    rows = rows_of("selection.csv")
    origin = {"method": "typicality", "seed": "0", "arm": "pixels", "encoder": encoder_digest(ENCODER)}
    assert all(row["label"] == "" and row.items() >= origin.items() for row in rows)
    ids = {path: i for i, path in enumerate(before.paths)}
    chosen = [ids[row["path"]] for row in rows]
    assert len(set(chosen)) == 12
    assert np.isin(chosen, before.ids("unlabeled")).all()

    for row in rows[:10]:
        row["label"] = CLASSES[int(row["path"].split()[1]) % 2]
    with Path("selection.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    refused = lgp("select", "--budget", "5", "--arm", "pixels")
    assert refused.exit_code == 1
    assert "selection.csv has labels: `lgp labels add selection.csv` adds them" in refused.stderr
    added = lgp("labels", "add", "selection.csv")
    assert added.exit_code == 0, added.output
    assert "10 new labels, 0 changed, none removed, 0 as before, 2 rows without a label" in added.output

    after = add_labels()
    assert np.isin(chosen[:10], after.ids("train")).all()
    assert len(after.ids("unlabeled")) == 10
    monkeypatch.setattr(module, "extracted", None)  # features are there
    again = lgp("select", "--budget", "10", "--arm", "pixels", "--out", "next/second.csv", "--method", "margin")
    assert again.exit_code == 0, again.output
    assert {ids[row["path"]] for row in rows_of("next/second.csv")} == set(after.ids("unlabeled").tolist())
    assert Path("next/second.html").exists()


def test_page_shows_the_images_of_each_cluster_offline(start: Callable[..., LabelledImages]) -> None:
    data = start(40, labels=["first.csv"])
    assert lgp("select", "--budget", "9", "--arm", "pixels", "--method", "coverage").exit_code == 0
    rows, page = rows_of("selection.csv"), Path("selection.html").read_text()
    assert "http" not in page
    assert "Classes so far: ant, bee." in page
    assert encoder_digest(ENCODER) in page
    shown: list[tuple[str, str]] = []
    for section in re.split("<h2>Cluster ", page)[1:]:
        shown += [(section.partition("<")[0], path) for path in re.findall("<figcaption>(.*?)</figcaption>", section)]
    escaped = [(row["cluster"], row["path"].replace("<", "&lt;").replace(">", "&gt;")) for row in rows]
    assert sorted(shown) == sorted(escaped)
    assert [c for c, _ in shown] == sorted((c for c, _ in shown), key=[c for c, _ in escaped].index)
    ids = {path: i for i, path in enumerate(data.paths)}
    for found, (_, path) in zip(re.findall('src="data:image/jpeg;base64,(.*?)"', page), shown, strict=True):
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("L"))
        expected = data.pixels(ids[path.replace("&lt;", "<").replace("&gt;", ">")])[..., 0].repeat(20, 0).repeat(20, 1)
        assert np.abs(image.astype(int) - expected).mean() < 10  # of JPEG; other images are 85 apart


def test_selection_without_any_label(start: Callable[..., LabelledImages]) -> None:
    start(0, labels=[])
    result = lgp("select", "--budget", "3", "--arm", "pixels", "--method", "random")
    assert result.exit_code == 0, result.output
    assert "No image has a label yet." in Path("selection.html").read_text()
    refused = lgp("select", "--budget", "3", "--arm", "pixels", "--method", "margin")
    assert refused.exit_code == 1
    assert "margin needs labelled training images of two classes or more, there are 0" in refused.stderr


def test_default_is_the_graft_before_cl_and_mim(start: Callable[..., LabelledImages]) -> None:
    data = start(40, labels=["first.csv"])
    params = load_params(Path("params.yaml"))
    encoder = baseline_encoder("random", params)
    assert encoder is not None
    for arm in ("random", "mim", "graft", "cl"):
        save_encoder(Path("models") / arm / "encoder", encoder, params.model, params.data, data.normalization, {})
    assert lgp("select", "--budget", "3").exit_code == 0
    assert {row["arm"] for row in rows_of("selection.csv")} == {"graft"}
    (Path("models") / "graft" / "encoder" / "model.safetensors").unlink()
    assert lgp("select", "--budget", "3").exit_code == 0
    assert {row["arm"] for row in rows_of("selection.csv")} == {"cl"}
    assert lgp("select", "--budget", "3", "--arm", "random").exit_code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--budget", "21", "--arm", "pixels"], "--budget 21 is more than there are unlabelled training images: give"),
        (["--budget", "3"], "none of graft, cl, mim has an encoder yet"),
        (["--budget", "3", "--arm", "joint"], "there is no encoder of arm 'joint' yet"),
        (["--budget", "3", "--arm", "pixels", "--out", "a.html"], "a.html is no name of a CSV"),
    ],
)
def test_refusals_come_before_any_work(
    start: Callable[..., LabelledImages], command: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(40, labels=["first.csv"])
    monkeypatch.setattr(module, "extracted", None)
    result = lgp("select", *command)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not Path("selection.csv").exists()


def test_nothing_is_left_to_select(start: Callable[..., LabelledImages]) -> None:
    start(60, labels=["first.csv"])
    assert "every training image has a label" in lgp("select", "--budget", "1", "--arm", "pixels").stderr
