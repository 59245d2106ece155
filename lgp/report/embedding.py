"""The map of the leader's features: test images in a plane, near to each other where their features are alike.

The plane is t-SNE's (van der Maaten and Hinton 2008). Distances between far groups mean nothing. The page shows the
image under the pointer. It is one piece of HTML that loads nothing.
"""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from lgp.data.contact_sheet import thumbnail
from lgp.data.labels import LabelledImages
from lgp.features.cache import Features
from lgp.report.drawing import save, with_names

POINTS = 2000  # most images on the map: t-SNE takes some ten seconds for these
FEWEST = 10  # images
PERPLEXITY = 30.0
SIDE = 32  # of a thumbnail, in pixels
A_ROW = 50  # thumbnails in a row of their common picture


@dataclass(frozen=True)
class EmbeddingMap:
    """Test images on the map.

    Attributes:
        ids: (N,) image ids.
        places: (N, 2), in [0, 1].
        labels: (N,) class indices.
        predictions: (N,) class indices.
        classes: names.
    """

    ids: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    classes: Sequence[str]

    @property
    def colours(self) -> list[str]:
        """A colour for each class."""
        count = len(self.classes)
        if count <= colormaps["tab10"].N:
            return [to_hex(colormaps["tab10"](i)) for i in range(count)]
        return [to_hex(colormaps["nipy_spectral"]((i + 0.5) / count)) for i in range(count)]

    @with_names
    def draw(self, path: Path, arm: str) -> None:
        """Draw the map: a colour for each class, a ring around each mistake."""
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.subplots()
        axes.scatter(self.places[:, 0], self.places[:, 1], s=9, c=np.asarray(self.colours)[self.labels], linewidths=0)
        wrong = self.places[self.labels != self.predictions]
        axes.scatter(wrong[:, 0], wrong[:, 1], s=40, facecolors="none", edgecolors="black", label="mistake")
        axes.set(xticks=[], yticks=[], title=arm)
        axes.legend(loc="best")
        save(figure, path)

    def page(self, data: LabelledImages) -> str:
        """Return the map as HTML that shows the image under the pointer, or under a finger."""
        points = {
            "places": self.places.round(4).tolist(),
            "labels": self.labels.tolist(),
            "predictions": self.predictions.tolist(),
            "classes": list(self.classes),
            "colours": self.colours,
            "side": SIDE,
            "row": A_ROW,
        }
        # a name that contains "</script>" must not end the script
        values = json.dumps(points).replace("<", "\\u003c")
        legend = " ".join(
            f'<span style="color:{colour}">■</span> {escape(name)}'
            for name, colour in list(zip(self.classes, self.colours, strict=True))[:A_ROW]
        )
        parts = {"VALUES": values, "LEGEND": legend, "THUMBNAILS": self._thumbnails(data)}
        # in one go: a class may be called LEGEND
        return re.sub("|".join(parts), lambda found: parts[found[0]], MAP)

    def _thumbnails(self, data: LabelledImages) -> str:
        """Return all thumbnails as one JPEG in base64, a row after the other."""
        sheet = Image.new("RGB", (A_ROW * SIDE, -(-len(self.ids) // A_ROW) * SIDE), "white")
        for number, square in enumerate(data.squares(self.ids)):
            sheet.paste(thumbnail(square, SIDE), (number % A_ROW * SIDE, number // A_ROW * SIDE))
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=85)
        return base64.b64encode(file.getvalue()).decode()


def embedding_map(
    features: Features, predictions: pd.DataFrame, classes: Sequence[str], seed: int
) -> EmbeddingMap | None:
    """Lay the test images out in a plane by their features, at most `POINTS` of them; None where there are too few.

    Args:
        features: of an encoder.
        predictions: of the same encoder's linear probe: a row per test image.
        classes: names.
        seed: of the choice of images, and of t-SNE.
    """
    ids = features.ids["test"]
    if len(ids) < FEWEST:
        return None
    rows = np.sort(np.random.default_rng(seed).permutation(len(ids))[:POINTS])
    x = features.x["test"][rows].astype(np.float32)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    # the places depend on the number of threads, and threads that wait for a busy core take 30 times as long
    with threadpool_limits(1):
        places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)
    places = (places - places.min(axis=0)) / np.ptp(places, axis=0)
    of_id = predictions[predictions["subset"] == 0].set_index("id").loc[ids[rows]]
    return EmbeddingMap(ids[rows], places, of_id["label"].to_numpy(), of_id["prediction"].to_numpy(), classes)


MAP = """
<div id="map">
<p><label><input type="checkbox" id="wrong"> mistakes only</label> &emsp;<span id="said">a ring: a mistake</span></p>
<canvas width="1400" height="1000" style="width:100%; border:1px solid gray; background:white; touch-action:pan-y">
</canvas>
<p style="font-size:.85rem">LEGEND</p>
<script>
(() => {
  const v = VALUES, box = document.getElementById("map"), canvas = box.querySelector("canvas");
  const said = box.querySelector("#said"), wrong = box.querySelector("#wrong"), pen = canvas.getContext("2d");
  const thumbnails = new Image(), edge = 24, big = 160;
  thumbnails.src = "data:image/jpeg;base64,THUMBNAILS";
  const along = (share, size) => edge + share * (size - 2 * edge);
  const place = i => [along(v.places[i][0], canvas.width), along(v.places[i][1], canvas.height)];
  const mistaken = i => v.labels[i] !== v.predictions[i];
  const shown = () => [...v.places.keys()].filter(i => !wrong.checked || mistaken(i));
  function draw(at) {
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (const i of shown()) {
      const [x, y] = place(i);
      pen.beginPath(); pen.arc(x, y, 6, 0, 7); pen.fillStyle = v.colours[v.labels[i]]; pen.fill();
      if (mistaken(i)) {
        pen.beginPath(); pen.arc(x, y, 11, 0, 7); pen.lineWidth = 2; pen.strokeStyle = "black"; pen.stroke();
      }
    }
    if (at === undefined) return;
    const [x, y] = place(at), left = x < canvas.width / 2 ? x + 14 : x - 14 - big;
    const top = Math.min(Math.max(y - big / 2, 0), canvas.height - big);
    pen.imageSmoothingEnabled = false;
    const column = at % v.row, row = Math.floor(at / v.row);
    pen.drawImage(thumbnails, column * v.side, row * v.side, v.side, v.side, left, top, big, big);
    pen.lineWidth = 2; pen.strokeStyle = "#888"; pen.strokeRect(left, top, big, big);
    const taken = mistaken(at) ? ", taken for " + v.classes[v.predictions[at]] : "";
    said.textContent = "this image: " + v.classes[v.labels[at]] + taken;
  }
  canvas.addEventListener("pointermove", event => {
    const scale = canvas.width / canvas.clientWidth, x = event.offsetX * scale, y = event.offsetY * scale;
    const far = i => { const [a, b] = place(i); return (a - x) ** 2 + (b - y) ** 2; };
    const near = shown().reduce((best, i) => best === undefined || far(i) < far(best) ? i : best, undefined);
    if (near !== undefined) draw(near);
  });
  wrong.addEventListener("change", () => draw());
  draw();
})();
</script>
</div>
"""
