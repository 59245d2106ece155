"""The map of the features: which image lies where, and what the page holds."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances
from threadpoolctl import threadpool_info, threadpool_limits

from lgp.data.contact_sheet import thumbnail
from lgp.data.labels import LabelledImages
from lgp.features.cache import Features
from lgp.params.evaluate import FeatureParams
from lgp.report import embedding
from lgp.report.embedding import SIDE, embedding_map
from lgp.report.page import to_html

CLASSES = ["LEGEND of THUMBNAILS", "</script><b>"]


def features(ids: np.ndarray) -> Features:
    """Two far groups in turn."""
    x = np.random.default_rng(0).normal(0, 0.1, (len(ids), 8)) + np.where(np.arange(len(ids)) % 2, 1, -1)[:, None]
    return Features({"test": x.astype(np.float32)}, {}, {"test": ids}, 2, {}, FeatureParams())


def predictions(ids: np.ndarray) -> pd.DataFrame:
    """Labels are the groups. The first three images are mistaken. Rows are shuffled. A second subset is all wrong."""
    labels = np.arange(len(ids)) % 2
    given = np.where(np.arange(len(ids)) < 3, 1 - labels, labels)
    first = pd.DataFrame({"id": ids, "label": labels, "prediction": given, "subset": 0})
    return pd.concat([first.assign(prediction=1 - labels, subset=1), first]).sample(frac=1, random_state=0)


def test_every_image_keeps_its_label_and_like_images_lie_together() -> None:
    ids = 100 + 3 * np.arange(60)
    found = embedding_map(features(ids), predictions(ids), CLASSES, 0)
    assert found is not None
    assert found.ids.tolist() == ids.tolist()
    assert found.labels.tolist() == [0, 1] * 30
    assert np.flatnonzero(found.labels != found.predictions).tolist() == [0, 1, 2]
    assert (found.places.min(axis=0).tolist(), found.places.max(axis=0).tolist()) == ([0, 0], [1, 1])
    distances = pairwise_distances(found.places)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) % 2).tolist() == [0, 1] * 30  # the nearest is of the same group


def test_map_is_laid_out_by_one_thread_whatever_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []

    class Watched(TSNE):  # type: ignore[misc]
        def fit_transform(self, x: np.ndarray) -> np.ndarray:
            used.extend(library["num_threads"] for library in threadpool_info())
            places: np.ndarray = super().fit_transform(x)
            return places

    monkeypatch.setattr(embedding, "TSNE", Watched)
    ids = np.arange(60)
    with threadpool_limits(2):
        embedding_map(features(ids), predictions(ids), CLASSES, 0)
    assert set(used) == {1}


def test_map_takes_some_of_many_images_and_none_of_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(60)
    monkeypatch.setattr(embedding, "POINTS", 20)
    found = embedding_map(features(ids), predictions(ids), CLASSES, 0)
    assert found is not None
    assert len(set(found.ids)) == len(found.places) == 20
    assert found.labels.tolist() == (found.ids % 2).tolist()
    assert embedding_map(features(ids[:9]), predictions(ids[:9]), CLASSES, 0) is None


def test_page_holds_each_thumbnail_and_no_name_ends_its_script(prepared: LabelledImages, tmp_path: Path) -> None:
    ids = prepared.ids("test")[:60]
    found = embedding_map(features(ids), predictions(ids), CLASSES, 0)
    assert found is not None
    page = found.page(prepared)
    assert page.count("</script>") == 1
    values = json.loads(re.findall(r"const v = (.*?), box", page)[0])
    assert values["classes"] == CLASSES
    assert values["labels"] == [0, 1] * 30
    encoded = re.findall(r'data:image/jpeg;base64,([^"]+)', page)[0]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"), dtype=float)
    for number in (0, 57):
        left, top = number % values["row"] * SIDE, number // values["row"] * SIDE
        square = np.asarray(thumbnail(prepared.pixels(int(ids[number])), SIDE), dtype=float)
        assert np.abs(sheet[top : top + SIDE, left : left + SIDE] - square).mean() < 12  # JPEG
    found.draw(tmp_path / "map.png", "graft")
    html = to_html("# Title\n\n![map](map.png)\n", "T", tmp_path, {"map": page})
    assert page in html
    assert "data:image/png" not in html
