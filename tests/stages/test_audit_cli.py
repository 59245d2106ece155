"""`lgp audit` as its users run it: look, correct, add the labels, look again."""

import csv
import io
import re
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
from lgp.errors import LgpError
from lgp.evaluate import audit as module
from lgp.models.encoder_folder import save_pixels
from lgp.models.files import encoder_digest
from lgp.params.file import load_params

PREPARED, LABELS, ENCODER = Path("data/prepared"), Path("data/labels"), Path("models/pixels/encoder")
IMAGES = 90


def lgp(*command: str) -> Result:
    return CliRunner().invoke(app, list(command))


def class_of(i: int) -> str:
    return ("ant", "bee")[i % 2]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]) -> LabelledImages:
    """A project of 90 images whose upper or lower half is bright. Five have a wrong label, and one has a near copy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    Path("raw").mkdir()
    for i in range(IMAGES):
        pixels = np.random.default_rng(i).integers(0, 160, (8, 8), dtype=np.uint8)
        pixels[4 * (i % 2) : 4 * (i % 2) + 4] += 90
        Image.fromarray(pixels).save(Path("raw") / f"bild, {i} <b>.png")
    near = np.array(Image.open("raw/bild, 8 <b>.png"))
    near[0, 0] ^= 1
    Image.fromarray(near).save("raw/copy.png")
    wrong = range(10, 15)
    rows = [f'"bild, {i} <b>.png",{class_of(i + (i in wrong))}' for i in range(IMAGES)]
    Path("first.csv").write_text("\n".join(["path,label", *rows, "copy.png,bee"]))
    own = {"source": "raw", "max_train_images": None, "labels": ["first.csv"]}
    Path("params.yaml").write_text(yaml.safe_dump(merged(values, {"data": own})))
    params = load_params(Path("params.yaml"))
    PREPARED.mkdir(parents=True)
    prepare(params.data, params.seed, PREPARED, Path("held_out.csv"))
    save_pixels(ENCODER, Images(PREPARED), {})
    return add_labels()


def rows_of(file: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(file).read_text())))


def test_wrong_labels_are_listed_corrected_and_come_back(data: LabelledImages) -> None:
    pytest.importorskip("cleanlab")
    result = lgp("audit", "--arm", "pixels")
    assert result.exit_code == 0, result.output
    rows = {row["path"]: row for row in rows_of("audit.csv")}
    assert f"audit: {len(rows)} of 91 labels look wrong (duplicate 2, label" in result.output
    assert all(row["label"] == "" and row["encoder"] == encoder_digest(ENCODER) for row in rows.values())
    twins = {path: row["other"] for path, row in rows.items() if row["kind"].startswith("duplicate")}
    assert twins == {"bild, 8 <b>.png": "copy.png", "copy.png": "bild, 8 <b>.png"}
    assert list(rows)[:2] == sorted(twins, key=data.paths.index)
    wrong = [f"bild, {i} <b>.png" for i in range(10, 15)]
    for i, path in zip(range(10, 15), wrong, strict=True):
        assert (rows[path]["given"], rows[path]["suggested"]) == (class_of(i + 1), class_of(i))
        assert float(rows[path]["probability"]) < 0.5
    parts = {part: set(np.array(data.paths)[data.ids(part)]) for part in ("train", "val", "test")}
    assert all(path in parts[row["used_as"]] for path, row in rows.items())

    for path in wrong[:4]:
        rows[path]["label"] = rows[path]["suggested"]
    with Path("audit.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(next(iter(rows.values()))))
        writer.writeheader()
        writer.writerows(rows.values())
    refused = lgp("audit", "--arm", "pixels")
    assert refused.exit_code == 1
    assert "audit.csv has labels: `lgp labels add audit.csv` adds them" in refused.stderr
    added = lgp("labels", "add", "audit.csv")
    assert added.exit_code == 0, added.output
    assert f"0 new labels, 4 changed, none removed, 0 as before, {len(rows) - 4} rows without a label" in added.output

    after = add_labels()
    changed = {data.paths[i] for i in np.flatnonzero(data.labels != after.labels)}
    assert changed == set(wrong[:4])
    assert lgp("audit", "--arm", "pixels", "--out", "next/second.csv").exit_code == 0
    again = {row["path"] for row in rows_of("next/second.csv")}
    assert not again & set(wrong[:4])
    assert again >= {wrong[4], *twins}


def test_page_shows_each_image_and_its_duplicate_offline(data: LabelledImages) -> None:
    pytest.importorskip("cleanlab")
    assert lgp("audit", "--arm", "pixels").exit_code == 0
    page, rows = Path("audit.html").read_text(), rows_of("audit.csv")
    assert "http" not in page
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == page.count("<img ") == len(rows) + 2
    assert "as bee: copy.png" in captions
    assert not [caption for caption in captions if "ant, rather ant" in caption or "bee, rather bee" in caption]
    assert f"ant, rather bee: bild, 11 &lt;b&gt;.png ({data.parts[data.paths.index('bild, 11 <b>.png')]})" in captions


def test_judgement_gets_the_groups_seed_and_parameters_of_the_project(
    data: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def recorded(*arguments: Any) -> Any:
        given.extend(arguments)
        raise LgpError("enough")

    monkeypatch.setattr(module, "judge", recorded)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    text = Path("params.yaml").read_text().replace("c_fixed: 0.1", "c_fixed: 0.7").replace("seed: 0", "seed: 3")
    Path("params.yaml").write_text(text)
    assert "enough" in lgp("audit", "--arm", "pixels").stderr
    features, groups, fewshot, seed, device = given
    assert np.array_equal(groups, module._groups(data)[data.ids("train")])
    assert np.array_equal(features.ids["train"], data.ids("train"))
    assert (fewshot.c_fixed, seed, device.type) == (0.7, 3, "cpu")


def test_an_audit_that_finds_nothing_leaves_no_table_of_another(
    data: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cleanlab")
    assert lgp("audit", "--arm", "pixels").exit_code == 0
    monkeypatch.setattr("lgp.evaluate.audit.audit", lambda *_: [])
    result = lgp("audit", "--arm", "pixels")
    assert result.exit_code == 0, result.output
    assert "audit: 0 of 91 labels look wrong, by the features of pixels" in result.output
    assert not Path("audit.csv").exists()
    assert not Path("audit.html").exists()


def test_refusals_come_before_any_work(data: LabelledImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lgp.features.cache.extracted", None)
    assert "none of graft, cl, mim has an encoder yet" in lgp("audit").stderr
    assert "a.html is no name of a CSV" in lgp("audit", "--arm", "pixels", "--out", "a.html").stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs cleanlab: pip install 'lgp[audit]'" in lgp("audit", "--arm", "pixels").stderr
